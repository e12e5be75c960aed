# Sourced by the proofs: whose folder it is that results go to.
# shellcheck shell=bash

# take_folder FOLDER MARK...: takes a folder that is absent, empty, or was taken before; also one
# that an earlier version of the script filled, which a MARK in it shows. Ends the script otherwise.
take_folder() {
    local folder="$1" script="${0##*/}" mark
    local taken="$folder/.made-by-${script%.sh}"
    if [[ ! -e "$taken" ]]; then
        for mark in "${@:2}"; do
            [[ -e "$folder/$mark" ]] && taken=""
        done
        if [[ -n "$taken" && -e "$folder" && -n "$(find "$folder/" -mindepth 1 -maxdepth 1 ! -name .DS_Store)" ]]; then
            echo "$script: OUTPUT_DIR $folder is not empty and was not made by this script;" \
                "choose a new folder" >&2
            exit 2
        fi
    fi
    mkdir -p "$folder"
    : >"$folder/.made-by-${script%.sh}"
}
