"""Every kind of input becomes rows: tables, folders and tars, local, remote or on the Hugging Face hub."""
