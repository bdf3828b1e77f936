"""The models that are installed on this machine beside the embedded one: `perco models`.

checkpoint   what is recorded of an installed model; needs no torch
inventory    list, verify, remove; needs no torch
install      a published folder, or one from the hub, into the store
download     folders from the hub
resume       their large files, so that a download that was broken off goes on
check        keys and shapes against configurations, without loading weights
component_files   which files of a component are taken; pickled weights to safetensors
preview_colours   the mean colour of each code, which thumbnails of Stable Diffusion models show
"""
