//! The completions for shells, generated from the table of flags. The files that are
//! installed are in `packaging/completions/`; the test writes them if
//! `UPDATE_COMPLETIONS` is set.

use super::flags::{FLAGS, Flag, Takes};

const COMMANDS: [&str; 6] = ["status", "check", "doctor", "import", "mount", "umount"];
const NAMES: &str = "rwsplit overlay-read-write-splitting-snapshotter";
const MADE: &str =
    "# Made from the table of flags in src/config/flags.rs; a test holds the two equal.";

fn names(is_one: impl Fn(&Flag) -> bool) -> Vec<&'static str> {
    let flags = FLAGS.iter().filter(|flag| is_one(flag));
    flags.map(|flag| flag.name).collect()
}

/// The flags of a command, or of the daemon.
fn flags_of(command: Option<&str>) -> String {
    let goes_with = |flag: &Flag| match command {
        None => flag.commands.is_empty(),
        Some(command) => flag.commands.is_empty() || flag.commands.contains(&command),
    };
    match command {
        Some("umount") => String::new(),
        _ => names(goes_with).join(" "),
    }
}

fn bash() -> String {
    let takes = |wanted: &[Takes]| names(|flag| wanted.contains(&flag.takes)).join(" | ");
    let mut values = String::new();
    for flag in FLAGS {
        if let Takes::OneOf(words) = flag.takes {
            let words = words.join(" ");
            values.push_str(&format!(
                "    {}) _rwsplit_words \"{words}\" ;;\n",
                flag.name
            ));
        }
    }
    let mut commands = String::new();
    for command in COMMANDS {
        let flags = flags_of(Some(command));
        commands.push_str(&format!("        {command}) words=\"{flags}\" ;;\n"));
    }
    format!(
        r#"# shellcheck shell=bash
{MADE}

_rwsplit_words() {{
    # Words without blanks.
    # shellcheck disable=SC2207
    COMPREPLY=($(compgen -W "$1" -- "$cur"))
}}

_rwsplit_names() {{
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen "$1" -- "$cur")
}}

_rwsplit() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} at=$((COMP_CWORD - 1)) command='' word words
    COMPREPLY=()
    # bash takes --flag=value for three words.
    if [ "$cur" = = ]; then
        cur=
    elif [ "${{COMP_WORDS[at]}}" = = ]; then
        at=$((at - 1))
    fi
    case ${{COMP_WORDS[at]}} in
    {directories}) _rwsplit_names -d ;;
    {paths}) _rwsplit_names -f ;;
    {truths}) _rwsplit_words "true false" ;;
{values}    {others}) ;;
    *)
        for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
            case $word in
            {choices}) command=$word ;;
            esac
        done
        case $command in
        '') words="{all} {daemons} --help --version" ;;
{commands}        esac
        case $command/$cur in
        mount/[!-]* | umount/[!-]* | umount/) _rwsplit_names -d ;;
        *) _rwsplit_words "$words" ;;
        esac
        ;;
    esac
}}

complete -F _rwsplit {NAMES}
"#,
        directories = takes(&[Takes::Directory, Takes::Directories]),
        paths = takes(&[Takes::Path]),
        truths = takes(&[Takes::Truth]),
        others = takes(&[Takes::Word, Takes::Words]),
        choices = COMMANDS.join(" | "),
        all = COMMANDS.join(" "),
        daemons = flags_of(None),
    )
}

fn zsh() -> String {
    let mut lines = format!("#compdef {NAMES}\n{MADE}\n\n_arguments \\\n");
    for flag in FLAGS {
        let name = flag.name;
        let spec = match flag.takes {
            Takes::Nothing => name.to_owned(),
            Takes::Truth => format!("{name}=-:value:(true false)"),
            Takes::OneOf(words) => format!("{name}=:value:({})", words.join(" ")),
            Takes::Directory => format!("{name}=:directory:_files -/"),
            Takes::Directories => format!("*{name}=:directory:_files -/"),
            Takes::Path => format!("{name}=:path:_files"),
            Takes::Word => format!("{name}=:value: "),
            Takes::Words => format!("*{name}=:value: "),
        };
        lines.push_str(&format!("    '{spec}' \\\n"));
    }
    let commands = COMMANDS.join(" ");
    lines.push_str("    --help \\\n    --version \\\n");
    lines.push_str(&format!(
        "    '1:command:({commands})' \\\n    '*:directory:_files -/'\n"
    ));
    lines
}

fn fish() -> String {
    let mut lines = format!("{MADE}\n\n");
    for name in NAMES.split(' ') {
        let commands = COMMANDS.join(" ");
        lines.push_str(&format!(
            "complete -c {name} -f\n\
             complete -c {name} -n \"not __fish_seen_subcommand_from {commands}\" \
             -a \"{commands}\"\n\
             complete -c {name} -n \"__fish_seen_subcommand_from mount umount\" \
             -a \"(__fish_complete_directories)\"\n\
             complete -c {name} -l help\n\
             complete -c {name} -l version\n"
        ));
        for flag in FLAGS {
            let condition = match flag.commands {
                [] => String::new(),
                commands => format!(" -n \"__fish_seen_subcommand_from {}\"", commands.join(" ")),
            };
            let value = match flag.takes {
                Takes::Nothing | Takes::Truth => String::new(),
                Takes::OneOf(words) => format!(" -x -a \"{}\"", words.join(" ")),
                Takes::Directory | Takes::Directories => {
                    " -x -a \"(__fish_complete_directories)\"".to_owned()
                }
                Takes::Path => " -r -F".to_owned(),
                Takes::Word | Takes::Words => " -x".to_owned(),
            };
            let flag = flag.name.trim_start_matches('-');
            lines.push_str(&format!("complete -c {name}{condition} -l {flag}{value}\n"));
        }
    }
    lines
}

#[test]
fn completions_are_those_of_the_table() {
    for (shell, made) in [("bash", bash()), ("zsh", zsh()), ("fish", fish())] {
        let path = format!(
            "{}/packaging/completions/rwsplit.{shell}",
            env!("CARGO_MANIFEST_DIR")
        );
        if std::env::var_os("UPDATE_COMPLETIONS").is_some() {
            std::fs::write(&path, &made).unwrap();
        }
        let there = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            there == made,
            "{path} is not made from the table: run this test with UPDATE_COMPLETIONS=1"
        );
    }
}

/// The completions that bash offers for the last of these words.
fn offered(words: &str) -> Vec<String> {
    let script = format!(
        "{}\nCOMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _rwsplit\n\
         printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        bash()
    );
    let output = std::process::Command::new("bash")
        .args(["-c", &script])
        .output();
    let output = output.unwrap();
    assert!(output.stderr.is_empty(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    let mut lines: Vec<_> = said.lines().map(str::to_owned).collect();
    lines.retain(|line| !line.is_empty());
    lines
}

#[test]
fn bash_offers_what_fits() {
    for (words, expected) in [
        ("rwsplit st", &["status"][..]),
        (
            "rwsplit check --re",
            &[
                "--require-mount",
                "--reserve",
                "--record-digests",
                "--relocate",
                "--relocate-after",
                "--repair",
                "--reset-writable",
            ],
        ),
        ("rwsplit status --rep", &[]),
        ("rwsplit import --dr", &["--dry-run"]),
        ("rwsplit --quota ''", &["auto", "require", "off"]),
        ("rwsplit --quota = r", &["require"]),
        ("rwsplit --sync =", &["commit", "none"]),
        ("rwsplit status --reserve ''", &[]),
        ("rwsplit --root-dir /usr/sha", &["/usr/share"]),
        ("rwsplit umount /usr/sha", &["/usr/share"]),
    ] {
        assert_eq!(offered(words), expected, "{words}");
    }
}
