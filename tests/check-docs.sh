#!/bin/sh
# Checks what the pages refer to: links between them lead to files and headings that
# exist, and the map in docs/design.md names files that exist. The Chinese README has the
# same code blocks, code, flags, links and figures as the English one, in the same order.
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

for page in README.md README.zh-CN.md docs/*.md tests/README.md; do
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

# code_blocks FILE: their lines without comments. A picture counts as one line, because
# the words in it are translated.
code_blocks() {
    awk 'function end_block() {
            printf "%s", block ~ /│|─/ ? "    (a picture)\n" : block
            block = ""
        }
        /^    / { sub(/[ \t]+#.*/, ""); block = block $0 "\n"; next }
        { end_block() }
        END { end_block() }' "$1"
}

# matches PATTERN FILE: prints what matches outside of code blocks, one match
# per line.
matches() {
    grep -v '^    ' "$2" | grep -Eo -e "$1" || :
}

# compare WHAT ENGLISH CHINESE: complains about the lines in which the two differ.
compare() {
    printf '%s\n' "$2" >"$scratch/english"
    printf '%s\n' "$3" >"$scratch/chinese"
    [ -n "$2" ] || complain "README.md: no $1 found"
    diff -U 2 "$scratch/english" "$scratch/chinese" >"$scratch/difference" && return
    complain "README.zh-CN.md: $1: not as in README.md (- only there, + only here):"
    sed -e 1,2d -e '/^@@/d' -e 's/^/    /' "$scratch/difference" >&2
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
english=README.md
chinese=README.zh-CN.md
compare "code blocks" "$(code_blocks $english)" "$(code_blocks $chinese)"
# Backticks are part of the pattern.
# shellcheck disable=SC2016
code='`[^`]*`|--[a-z][a-z-]*'
compare "code and flags" "$(matches "$code" $english)" "$(matches "$code" $chinese)"
# The links from each README to the other one differ.
compare "links" "$(links $english)" "$(links $chinese |
    sed -e 's/^README\.md$/README.zh-CN.md/' -e t -e 's/^README\.zh-CN\.md$/README.md/')"
figure='[0-9]+([.,][0-9]+)*'
compare "figures" "$(matches "$figure" $english)" "$(matches "$figure" $chinese)"
exit "$broken"
