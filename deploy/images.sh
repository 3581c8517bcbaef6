#!/usr/bin/env bash
# Writes what a release's images are called, as kustomize wants it: one file for each kind of card, with the CPU image (the
# fleet's Job, the overlay `cpu`) and the CUDA image (the servers) by their digests.
#
#   deploy/images.sh FOLDER        reads image-cpu.txt and image-cuda-smNN.txt there, each with one name@sha256:..., and
#                                  writes images-smNN.yaml beside them
set -euo pipefail
cd "$1"
entry() {
    local image
    image="$(< "$2")"
    [[ "$image" =~ ^[a-z0-9./:_-]+@sha256:[0-9a-f]{64}$ ]] || { echo "$2: expected name@sha256:..., found $image" >&2; exit 1; }
    printf '  - name: %s\n    newName: %s\n    digest: %s\n' "$1" "${image%@*}" "${image#*@}"
}
for cuda in image-cuda-*.txt; do
    card="${cuda#image-cuda-}"
    out="images-${card%.txt}.yaml"
    {
        echo "# Into the kustomization.yaml over an overlay of deploy/kustomize, or in place of its \`images:\`."
        echo "images:"
        entry warm-cpu image-cpu.txt
        entry warm-cuda "$cuda"
    } > "$out"
    echo "$out"
done
