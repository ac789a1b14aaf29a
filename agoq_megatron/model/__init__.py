"""The model that the flags describe: its config, and what each of its layers keeps."""
