"""tlcr's discriminator inside the trainers of others: ids go in, exactly as many rewards come out.

``contract`` says what every adaptor takes and returns, ``guard`` whether an adaptor fits the installed trainer, and
``advantages`` has an estimator for trainers without a critic. ``local`` and ``client`` score: here, or by a server.
``vllm_weights`` is what a vLLM server imports that takes weights over the network. Each other module is an adaptor to
one trainer.

Trainers pin versions of transformers that tlcr's other folders do not run with. Importing this folder, ``contract``,
``guard``, ``client`` or ``local`` therefore imports the standard library alone; an adaptor imports its trainer too.
"""
