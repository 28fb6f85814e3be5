"""What a machine with a GPU is asked first: is everything right there, and how fast is it?"""
