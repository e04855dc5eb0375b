//! The program: reads its arguments, runs the daemon or a command, prints what
//! went wrong.

use std::process::ExitCode;

use overlay_read_write_splitting_snapshotter::commands::{
    ASK_CHILD, ask_for_mark, check, configuration, doctor, import, mount, output, status,
};
use overlay_read_write_splitting_snapshotter::config::{Command, Parsed};
use overlay_read_write_splitting_snapshotter::daemon;
use overlay_read_write_splitting_snapshotter::error::Result;
use overlay_read_write_splitting_snapshotter::mount::{USER_NAMESPACE_CHILD, hold_user_namespace};

/// The exit code of `check`, `doctor` and `import` for a failure of the command itself.
/// Their exit code 1 means that they have found something wrong.
const COULD_NOT_LOOK: u8 = 2;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let is_any = |word: &&str| arguments.iter().any(|argument| argument == word);
    let mut finds = ["check", "doctor", "import"].iter().any(is_any);
    let is_well = if arguments == [USER_NAMESPACE_CHILD] {
        hold_user_namespace().map(|()| true)
    } else if let [word, path] = &*arguments
        && word == ASK_CHILD
    {
        ask_for_mark(&path.to_string_lossy());
        Ok(true)
    } else {
        configuration::read(arguments).and_then(|parsed| {
            finds = matches!(
                parsed,
                Parsed::Run(
                    _,
                    Command::Check(_) | Command::Doctor(_) | Command::Import(_)
                )
            );
            run(parsed)
        })
    };
    match is_well {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let text = output::harmless(&error.chain());
            eprintln!("{}: {text}", env!("CARGO_PKG_NAME"));
            ExitCode::from(if finds { COULD_NOT_LOOK } else { 1 })
        }
    }
}

/// Does what the arguments ask for. Returns `false` if a command has found
/// something wrong.
fn run(parsed: Parsed) -> Result<bool> {
    let (config, command) = match parsed {
        Parsed::Print(text) => {
            output::print(&text);
            return Ok(true);
        }
        Parsed::Run(config, command) => (config, command),
    };
    start_log();
    match command {
        Command::Check(options) => return check::run(&config, options),
        Command::Doctor(options) => return doctor::run(&config, &options),
        Command::Import(options) => return import::run(&config, options),
        Command::Serve => daemon::run(&config)?,
        Command::Status(format) => status::run(&config, format)?,
        Command::Mount(options) => mount::mount(&config, &options)?,
        Command::Unmount(target) => mount::umount(&target)?,
    }
    Ok(true)
}

/// Logs to standard error, with the level of `RUST_LOG` (default: info). Lines
/// for the journal have no time, because the journal adds it (systemd.exec(5),
/// `$JOURNAL_STREAM`).
fn start_log() {
    let environment = env_logger::Env::default().default_filter_or("info");
    let mut builder = env_logger::Builder::from_env(environment);
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        builder.format_timestamp(None);
    } else {
        builder.format_timestamp_millis();
    }
    builder.format_target(false).init();
}
