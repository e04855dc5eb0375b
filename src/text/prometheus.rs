//! Figures in the text format of Prometheus ("Exposition formats", version
//! 0.0.4).

use std::fmt::{Display, Write};

/// How a figure can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The figure only grows, from 0 at the start of the program.
    Counter,
    /// The figure goes up and down.
    Gauge,
    /// There is a figure for each bound: how many values were not larger than the bound.
    Histogram,
}

/// Writes the header for the figures with this name.
pub fn head(out: &mut String, kind: Kind, name: &str, help: &str) {
    let kind = match kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram => "histogram",
    };
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Writes one figure. The texts of labels are not escaped, because all labels
/// are plain words.
pub fn line(out: &mut String, name: &str, labels: &[(&str, &str)], value: impl Display) {
    out.push_str(name);
    for (number, (label, text)) in labels.iter().enumerate() {
        let before = if number == 0 { '{' } else { ',' };
        let _ = write!(out, "{before}{label}=\"{text}\"");
    }
    if !labels.is_empty() {
        out.push('}');
    }
    let _ = writeln!(out, " {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_written_as_prometheus_reads_them() {
        let mut text = String::new();
        head(&mut text, Kind::Gauge, "free", "What is free.");
        line(&mut text, "free", &[("a", "x"), ("b", "y z")], 7);
        line(&mut text, "free", &[], 0.5);
        assert_eq!(
            text,
            "# HELP free What is free.\n# TYPE free gauge\nfree{a=\"x\",b=\"y z\"} 7\nfree 0.5\n"
        );
    }
}
