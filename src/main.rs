//! The program: reads its arguments, runs the daemon or a command, prints what
//! went wrong.

use std::process::ExitCode;

use overlay_read_write_splitting_snapshotter::commands::{
    self, check, doctor, import, output, status,
};
use overlay_read_write_splitting_snapshotter::config::{Parsed, parse};
use overlay_read_write_splitting_snapshotter::error::Error;
use overlay_read_write_splitting_snapshotter::{daemon, mount};

/// The commands whose exit code 1 says that not all is well.
const FINDING: [&str; 3] = ["check", "doctor", "import"];
/// What theirs is where they could not look.
const COULD_NOT: u8 = 2;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if arguments == [mount::USER_NAMESPACE_CHILD] {
        return finish(mount::hold_user_namespace());
    }
    let is_finding = arguments
        .iter()
        .any(|argument| FINDING.iter().any(|command| argument == command));
    match parse(arguments) {
        Ok(Parsed::Run(config)) => {
            start_log();
            finish(daemon::run(&config))
        }
        Ok(Parsed::Check(config, options)) => {
            start_log();
            found(check::run(&config, options))
        }
        Ok(Parsed::Status(config, format)) => {
            start_log();
            finish(status::run(&config, format))
        }
        Ok(Parsed::Doctor(config, options)) => {
            start_log();
            found(doctor::run(&config, &options))
        }
        Ok(Parsed::Import(config, options)) => {
            start_log();
            found(import::run(&config, options))
        }
        Ok(Parsed::Mount(config, options)) => {
            start_log();
            finish(commands::mount::mount(&config, &options))
        }
        Ok(Parsed::Unmount(target)) => finish(commands::mount::umount(&target)),
        Ok(Parsed::Print(text)) => {
            output::print(&text);
            ExitCode::SUCCESS
        }
        Err(error) if is_finding => found(Err(error)),
        Err(error) => finish(Err(error)),
    }
}

fn finish(result: Result<(), Error>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

/// For a command that tells whether all is well.
fn found(is_well: Result<bool, Error>) -> ExitCode {
    match is_well {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            complain(&error);
            ExitCode::from(COULD_NOT)
        }
    }
}

fn complain(error: &Error) {
    eprintln!(
        "overlay-read-write-splitting-snapshotter: {}",
        error.chain()
    );
}

/// On standard error, level by `RUST_LOG` (default info); the journal adds the
/// time by itself (systemd.exec(5), `$JOURNAL_STREAM`).
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
