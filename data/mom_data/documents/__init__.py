"""Raw documents: files that people have, read member by member, with an account of every member."""
