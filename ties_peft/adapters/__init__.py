"""Read and write the files of adapters, and what lies beside them.

In: folders, files, Hub ids. Out: an `Adapter` whose task vectors are read lazily and checked; folders that appear whole or not
at all. Uses: `task_vectors`. `types` has one file for each PEFT type, `formats` the formats of other trainers.
The names of the targets (see `targets`) stand here, where the command line shows them without importing torch.
"""

PEFT, VLLM, LLAMA_CPP, DIFFUSERS, KOHYA = "peft", "vllm", "llama.cpp", "diffusers", "kohya"
IMAGE_TARGETS = (DIFFUSERS, KOHYA)  # formats of LoRAs of image models
TARGETS = (PEFT, VLLM, LLAMA_CPP, *IMAGE_TARGETS)
