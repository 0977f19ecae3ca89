"""Read and write the files of adapters, and what lies beside them.

In: folders, files, Hub ids. Out: an `Adapter` whose task vectors are read lazily and checked; folders that appear whole or not
at all. Uses: `task_vectors`.
    adapter                  opens an adapter: config, modules, task vectors, digest
    sources, tensors         find files on this machine and on the Hub, and read tensors from them
    contents, types/         what a PEFT type asks of config, tensors and base model; one file for each PEFT type
    base_model               single tensors of the base's checkpoint; `module_names` for names of older transformers
    extra_tensors            tensors that belong to no adapted module; `extra_layers` compares those of several adapters
    recognise, formats/      files of other trainers, one file for each format; `to_peft` reads them as PEFT's, and `placement`
                             finds which modules of the base their names stand for
    image_models             names of the modules of image models; `image_files` writes their LoRAs
    statistics               Fisher information and second moments, kept beside an adapter
    targets                  what other programs load
    writer                   writes folders
    config_values            JSON, numbers and patterns that anyone may have written
    found_classes            the classes that the files of a folder define, here and in `spaces` and `methods`

The names of the targets (see `targets`) stand here, where the command line shows them without importing torch.
"""

PEFT, VLLM, LLAMA_CPP, DIFFUSERS, KOHYA = "peft", "vllm", "llama.cpp", "diffusers", "kohya"
IMAGE_TARGETS = {  # formats of LoRAs of image models, each with the name of its file
    DIFFUSERS: "pytorch_lora_weights.safetensors",
    KOHYA: "lora.safetensors",
}
TARGETS = (PEFT, VLLM, LLAMA_CPP, *IMAGE_TARGETS)
