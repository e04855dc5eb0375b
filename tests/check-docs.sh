#!/bin/sh
# Checks what the pages refer to: links between them lead to files and headings that
# exist, and the map in docs/design.md names files that exist.
#
#     sh tests/check-docs.sh
set -eu

cd "$(dirname "$0")/.."
broken=0
complain() {
    echo "check-docs.sh: $*" >&2
    broken=1
}

# anchors FILE: the anchor of each heading, as GitHub makes it.
anchors() {
    awk '/^    |^```/ { next } /^#+ / { sub(/^#+ /, ""); print tolower($0) }' "$1" |
        sed -e 's/[^a-z0-9 _-]//g' -e 's/ /-/g'
}

# links FILE: the targets of its links, without those of code blocks.
links() {
    grep -v '^    ' "$1" | grep -o '](\([^)]*\))' | sed -e 's/^](//' -e 's/)$//' || :
}

for page in README.md docs/*.md tests/README.md; do
    [ -e "$page" ] || continue
    for link in $(links "$page"); do
        case $link in
        http://* | https://*) continue ;;
        '#'*) target=$page ;;
        *) target=$(dirname "$page")/${link%%#*} ;;
        esac
        if [ ! -e "$target" ]; then
            complain "$page: $link: there is no such file"
            continue
        fi
        case $link in
        *'#'*) anchors "$target" | grep -qxF "${link#*#}" ||
            complain "$page: $link: there is no such heading" ;;
        esac
    done
done

# Backticks are part of the pattern.
# shellcheck disable=SC2016
for path in $(sed -n '/^## Where is what/,/^## What can go wrong/p' docs/design.md |
    grep -o '`[a-z]*/[^` ]*`' | tr -d '`'); do
    [ -e "$path" ] || complain "docs/design.md: $path: there is no such file"
done
exit "$broken"
