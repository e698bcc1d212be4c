"""The linear map whose weights are chosen by each row's modality."""
