//! Looks at containerd: its version, and whether a proxy plugin leads to this program.
//!
//! The configuration is read from `containerd config dump`, which merges
//! imports and fills in defaults (containerd
//! `cmd/containerd/command/config.go`).

use std::fs;
use std::process::Command;

use toml::{Table, Value};

use super::{Finding, docker, kubernetes};
use crate::config::{Config, DoctorOptions};
use crate::mount;
use crate::types::Quoted;

/// The name that the README gives to the proxy plugin.
const USUAL_NAME: &str = "rwsplit";
/// containerd's error if a proxy plugin has the name of one of containerd's own plugins
/// (`plugin/plugin.go`, `ErrIDRegistered`). containerd does not start with such a
/// configuration.
const NAME_IS_TAKEN: &str = "id already registered";

pub(super) fn look(config: &Config, options: &DoctorOptions) -> Vec<Finding> {
    let said = match ask(options, &["--version"]) {
        Ok(said) => said,
        Err(why) => return look_at_part(config, &why),
    };
    let version = version_of(&said);
    let mut findings = vec![Finding::good("containerd", version)];
    let dumped = ask(options, &["config", "dump"]);
    let parsed = dumped.and_then(|text| text.parse::<Table>().map_err(|error| error.to_string()));
    match parsed {
        Ok(table) => {
            let version = Version::parse(version);
            findings.extend(judge(config, &table, version));
            findings.extend(mapped_ids(config, &table, version));
            // The system's configuration file does not show what the containerd
            // of Docker is configured with.
            if options.containerd_config.is_none() {
                findings.extend(docker::look(
                    &table,
                    our_plugin(config, &table).map(|it| it.0),
                ));
            }
        }
        Err(why) => findings.push(Finding::bad(
            "plugin",
            format!("containerd's configuration cannot be read: {why}"),
        )),
    }
    findings
}

/// Programs that include a containerd: for each, the configuration file that it generates, and
/// the file for the user's own lines.
const PARTS: [(&str, &str); 4] = [
    (
        "/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
        "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.tmpl (config.toml.tmpl if the \
         version is 2)",
    ),
    (
        "/var/lib/rancher/rke2/agent/etc/containerd/config.toml",
        "/var/lib/rancher/rke2/agent/etc/containerd/config-v3.toml.tmpl (config.toml.tmpl if the \
         version is 2)",
    ),
    (
        "/var/snap/microk8s/current/args/containerd.toml",
        "/var/snap/microk8s/current/args/containerd-template.toml",
    ),
    (
        "/etc/k0s/containerd.toml",
        "a file in /etc/k0s/containerd.d",
    ),
];

/// Looks at the configuration that k3s or a similar program generates for its containerd. Used
/// if there is no program `containerd`.
fn look_at_part(config: &Config, why: &str) -> Vec<Finding> {
    let read = |(path, place)| Some((path, place, fs::read_to_string(path).ok()?));
    let Some((path, place, text)) = PARTS.into_iter().find_map(read) else {
        let text = format!(
            "{why}; if another program includes containerd, as k3s does, its configuration of \
             containerd needs these lines"
        );
        return vec![Finding::note("containerd", text).with_stanza(stanza(config, 3))];
    };
    let table = match text.parse::<Table>() {
        Ok(table) => table,
        Err(error) => {
            let text = format!("{path} cannot be read: {error}");
            return vec![Finding::bad("containerd", text)];
        }
    };
    // The version of containerd is unknown. This is the earliest one that has this format of
    // the configuration and pulls with the transfer service.
    let version = match at(&table, &["version"]).and_then(Value::as_integer) {
        Some(3..) => Version(2, 1, 0),
        _ => Version(1, 7, 16),
    };
    let text = format!("the configuration {path} is generated: write your own lines to {place}");
    let mut findings = vec![Finding::note("containerd", text)];
    findings.extend(judge(config, &table, version));
    findings
}

/// Runs containerd with these arguments, and returns its output.
fn ask(options: &DoctorOptions, words: &[&str]) -> Result<String, String> {
    let mut command = Command::new("containerd");
    if let Some(path) = &options.containerd_config {
        command.args(["--config", path]);
    }
    let output = command
        .args(words)
        .output()
        .map_err(|error| format!("the program containerd cannot be run: {error}"))?;
    if !output.status.success() {
        // With some configurations containerd panics, and prints a stack trace
        // after the message.
        let said = String::from_utf8_lossy(&output.stderr);
        let first = said.lines().find(|line| !line.trim().is_empty());
        let first = first.unwrap_or_default();
        let hint = match first.contains(NAME_IS_TAKEN) {
            true => format!(
                ": a proxy plugin has the name of one of containerd's own plugins: call the proxy \
                 plugin {USUAL_NAME:?}"
            ),
            false => String::new(),
        };
        return Err(format!(
            "'containerd {}' fails: {first}{hint}",
            words.join(" ")
        ));
    }
    String::from_utf8(output.stdout).map_err(|error| error.to_string())
}

/// The version in the output of `containerd --version`, which has the form `containerd
/// github.com/containerd/containerd 1.7.2 <commit>`.
fn version_of(said: &str) -> &str {
    let version = said.split_whitespace().nth(2);
    version.unwrap_or("of an unknown version")
}

/// A version of containerd. An unreadable version counts as the latest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// Parses a version such as `v2.1.0-rc.1` or `1.6.20~ds1`.
    fn parse(text: &str) -> Version {
        let parts = text.trim_start_matches('v').splitn(3, '.');
        let number = |part: &str| {
            let end = part.find(|c: char| !c.is_ascii_digit());
            part[..end.unwrap_or(part.len())].parse().ok()
        };
        let numbers: Option<Vec<u32>> = parts.map(number).collect();
        match numbers.as_deref() {
            Some([major, minor, patch]) => Version(*major, *minor, *patch),
            _ => Version(u32::MAX, 0, 0),
        }
    }
}

/// The value in a TOML table to which this path of keys leads.
pub(super) fn at<'a>(table: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (last, tables) = path.split_last()?;
    let mut table = table;
    for key in tables {
        table = table.get(*key)?.as_table()?;
    }
    table.get(*last)
}

pub(super) fn text_at<'a>(table: &'a Table, path: &[&str]) -> Option<&'a str> {
    at(table, path)?.as_str()
}

/// The name and the table of the proxy plugin that has this program's socket.
fn our_plugin<'a>(config: &Config, table: &'a Table) -> Option<(&'a str, &'a Value)> {
    let proxies = at(table, &["proxy_plugins"])?.as_table()?;
    let is_ours = |proxy: &Value| {
        let address = proxy.get("address").and_then(Value::as_str);
        address.is_some_and(|address| address.trim_start_matches("unix://") == config.address)
    };
    let (name, proxy) = proxies.iter().find(|(_, proxy)| is_ours(proxy))?;
    Some((name, proxy))
}

fn judge(config: &Config, table: &Table, version: Version) -> Vec<Finding> {
    let Some((name, proxy)) = our_plugin(config, table) else {
        return vec![missing(config, table)];
    };
    let mut findings = vec![plugin(name, proxy)];
    findings.extend(parallel_unpacking(proxy, mount::probe_user_namespace()));
    findings.extend(kubernetes::look(config, table, version, name, proxy));
    findings
}

/// The finding for a configuration without a proxy plugin that has this program's socket.
fn missing(config: &Config, table: &Table) -> Finding {
    let version = at(table, &["version"]).and_then(Value::as_integer);
    let proxies = at(table, &["proxy_plugins"]).and_then(Value::as_table);
    let others: Vec<_> = proxies
        .into_iter()
        .flatten()
        .filter(|(_, proxy)| proxy.get("type").and_then(Value::as_str) == Some("snapshot"))
        .filter_map(|(name, proxy)| {
            let address = proxy.get("address")?.as_str()?;
            Some(format!("{} has {address}", Quoted(name)))
        })
        .collect();
    let others = match others.as_slice() {
        [] => String::new(),
        others => format!(" ({})", others.join(", ")),
    };
    Finding::bad(
        "plugin",
        format!(
            "containerd's configuration has no proxy plugin with the address {}{others}",
            config.address
        ),
    )
    .with_stanza(stanza(config, version.unwrap_or(1)))
}

fn plugin(name: &str, proxy: &Value) -> Finding {
    let kind = proxy.get("type").and_then(Value::as_str);
    if kind != Some("snapshot") {
        return Finding::bad(
            "plugin",
            format!(
                "the type of the proxy plugin {} is {}, and has to be \"snapshot\"",
                Quoted(name),
                Quoted(kind.unwrap_or_default())
            ),
        );
    }
    Finding::good(
        "plugin",
        format!(
            "the proxy plugin {} leads to this program (restart containerd if you have just added \
             it)",
            Quoted(name)
        ),
    )
}

/// In a user namespace, containerd does not write the deletions of a layer, unless the
/// layer is unpacked onto its parent.
fn parallel_unpacking(proxy: &Value, is_in_user_namespace: bool) -> Option<Finding> {
    (is_in_user_namespace && has_capability(proxy, "rebase")).then(|| {
        Finding::bad(
            "plugin",
            "images with several layers cannot be pulled in this user namespace: remove \
             \"rebase\" from the capabilities of the proxy plugin",
        )
    })
}

/// Before 2.2, containerd cannot start a container on layers with mapped ids if what the
/// container writes is on another disk.
fn mapped_ids(config: &Config, table: &Table, version: Version) -> Option<Finding> {
    let (_, proxy) = our_plugin(config, table)?;
    (version < Version(2, 2, 0) && has_capability(proxy, "remap-ids")).then(|| {
        Finding::bad(
            "plugin",
            "containers with a user namespace do not start with this version of containerd: \
             remove \"remap-ids\" from the capabilities of the proxy plugin",
        )
    })
}

fn has_capability(proxy: &Value, wanted: &str) -> bool {
    let capabilities = proxy.get("capabilities").and_then(Value::as_array);
    let mut names = capabilities.into_iter().flatten().filter_map(Value::as_str);
    names.any(|name| name == wanted)
}

/// The lines that lead containerd to this program, in the version of its
/// configuration.
fn stanza(config: &Config, version: i64) -> String {
    let plugin = format!(
        "[proxy_plugins.{USUAL_NAME}]\n  type = \"snapshot\"\n  address = \"{}\"\n",
        config.address
    );
    let exports = format!(
        "  [proxy_plugins.{USUAL_NAME}.exports]\n    root = \"{}\"\n",
        config.root
    );
    let unpacking = match version < 3 {
        true => String::new(),
        false => format!("\n{}", unpack_stanza(["overlayfs", USUAL_NAME].into_iter())),
    };
    format!("{plugin}{exports}{unpacking}")
}

/// Lines with an entry of the transfer service for each of these snapshotters.
pub(super) fn unpack_stanza<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let machine = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    names
        .map(|name| {
            format!(
                "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  \
                 platform = \"linux/{machine}\"\n  snapshotter = \"{name}\"\n  \
                 differ = \"walking\"\n"
            )
        })
        .collect()
}

#[cfg(test)]
mod tests;
