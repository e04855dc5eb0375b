//! The command `doctor`: whether this machine, its disks and its containerd will
//! do, before anything is installed or when a container does not start.
//!
//! Owns: what is looked at, in which order, and how it is told. Leaves nothing
//! behind on the disks.

mod containerd;
mod disks;

use std::io::Write;

use serde_json::json;

use crate::commands::output::{Colour, coloured, paragraph};
use crate::config::{Config, DoctorOptions, Format};
use crate::error::{Error, ErrorKind, Result};
use crate::mount;

/// What the looking came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing keeps it from working.
    Fit,
    /// Something does.
    Unfit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    /// It works, but not all of it, or not as one might expect.
    Note,
    Bad,
}

/// What was found about one thing.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    topic: &'static str,
    verdict: Verdict,
    text: String,
    /// Lines for containerd's configuration.
    stanza: Option<String>,
}

impl Finding {
    fn new(topic: &'static str, verdict: Verdict, text: impl Into<String>) -> Finding {
        Finding {
            topic,
            verdict,
            text: text.into(),
            stanza: None,
        }
    }

    fn with_stanza(self, stanza: String) -> Finding {
        Finding {
            stanza: Some(stanza),
            ..self
        }
    }
}

/// Looks, and tells on standard output.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] without root, or as of
/// [`mount::enter_mount_namespace`].
pub fn run(config: &Config, options: &DoctorOptions) -> Result<Outcome> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::new(
            ErrorKind::FailedPrecondition,
            "doctor mounts overlays to try the disks: run it as root",
        ));
    }
    // What is mounted to try is nobody else's, and gone with this process.
    mount::enter_mount_namespace()?;
    let release = rustix::system::uname();
    let kernel = format!("Linux {}", release.release().to_string_lossy());
    let mut findings = vec![Finding::new("kernel", Verdict::Good, kernel)];
    findings.extend(disks::look(config));
    findings.extend(containerd::look(config, options));
    let text = match options.format {
        Format::Human => sentences(&findings),
        Format::Json => format!("{:#}\n", in_json(&findings)),
    };
    // A closed pipe is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(
        match findings
            .iter()
            .any(|finding| finding.verdict == Verdict::Bad)
        {
            true => Outcome::Unfit,
            false => Outcome::Fit,
        },
    )
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Verdict::Good => "ok",
            Verdict::Note => "note",
            Verdict::Bad => "BAD",
        }
    }

    fn colour(self) -> Colour {
        match self {
            Verdict::Good => Colour::Green,
            Verdict::Note => Colour::Yellow,
            Verdict::Bad => Colour::Red,
        }
    }
}

fn sentences(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let word = finding.verdict.word();
        let line = paragraph(&format!("{word:<5} {:<11} ", finding.topic), &finding.text);
        text.push_str(&coloured(finding.verdict.colour(), word));
        text.push_str(line.strip_prefix(word).unwrap_or(&line));
    }
    for finding in findings {
        if let Some(stanza) = &finding.stanza {
            let what = format!("{}, for containerd's configuration:", finding.topic);
            text.push_str(&format!("\n{what}\n\n"));
            for line in stanza.lines() {
                text.push_str(&format!("    {line}\n"));
            }
        }
    }
    text
}

fn in_json(findings: &[Finding]) -> serde_json::Value {
    let findings: Vec<_> = findings
        .iter()
        .map(|finding| {
            json!({
                "topic": finding.topic,
                "verdict": finding.verdict.word().to_lowercase(),
                "text": finding.text,
                "stanza": finding.stanza,
            })
        })
        .collect();
    json!({ "findings": findings })
}
