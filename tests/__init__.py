"""The tests, in folders that are named as the packages and rooms that they test."""
