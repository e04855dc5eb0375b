//! The command `doctor`, which checks whether this machine, its disks and its containerd are
//! suitable. A user runs it before an installation, or when a container does not start.
//!
//! Owns: the topics, their order, and the report. The command leaves nothing behind on
//! the disks.

mod containerd;
mod disks;
mod docker;
mod kubernetes;

use serde_json::json;

use crate::commands::output::{Colour, coloured, paragraph, show};
use crate::config::{Config, DoctorOptions};
use crate::error::{Error, Result};
use crate::mount;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    /// The topic works, but not completely or not as a user might expect.
    Note,
    Bad,
}

/// The result of looking at one topic.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    topic: &'static str,
    verdict: Verdict,
    text: String,
    /// Lines for containerd's configuration that the finding suggests.
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

    fn good(topic: &'static str, text: impl Into<String>) -> Finding {
        Finding::new(topic, Verdict::Good, text)
    }

    fn note(topic: &'static str, text: impl Into<String>) -> Finding {
        Finding::new(topic, Verdict::Note, text)
    }

    fn bad(topic: &'static str, text: impl Into<String>) -> Finding {
        Finding::new(topic, Verdict::Bad, text)
    }

    fn with_stanza(self, stanza: String) -> Finding {
        Finding {
            stanza: Some(stanza),
            ..self
        }
    }
}

/// Looks at this machine and prints the findings. Returns whether the snapshotter can
/// work.
///
/// # Errors
///
/// [`FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition) if the user
/// is not root.
pub fn run(config: &Config, options: &DoctorOptions) -> Result<bool> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::refused(
            "doctor mounts overlays to try the disks: run it as root",
        ));
    }
    // Only this process sees the mounts that are made to try the disks, and they
    // end with it.
    mount::enter_mount_namespace()?;
    let kernel = format!("Linux {}", mount::kernel_release());
    let mut findings = vec![Finding::good("kernel", kernel)];
    findings.extend(disks::look(config));
    findings.extend(containerd::look(config, options));
    show(
        options.format,
        || sentences(&findings),
        || in_json(&findings),
    );
    let is_bad = |finding: &Finding| finding.verdict == Verdict::Bad;
    Ok(!findings.iter().any(is_bad))
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
