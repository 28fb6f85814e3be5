"""``tlcr serve``: a discriminator behind HTTP, for trainers that run elsewhere or with other versions.

``app`` has the routes, ``protocols`` what each of them reads and writes, ``model`` the discriminator, ``batching`` its
queue, ``limits`` what a client may ask for, ``access`` the token, ``metrics`` the figures, ``processes`` the workers.
``export`` writes a discriminator's folder for vLLM, which serves it without tlcr.

starlette, uvicorn and prometheus_client come with the extra ``serve``.
"""
