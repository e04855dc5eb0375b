//! containerd: its version, and whether its configuration leads to us.
//!
//! What is asked is `containerd config dump`: it merges imports and fills in
//! defaults (containerd `cmd/containerd/command/config.go`).

use std::process::Command;

use toml::{Table, Value};

use super::Finding;
use crate::config::{Config, DoctorOptions};
use crate::mount;
use crate::types::Quoted;

/// The name that the README uses.
const USUAL_NAME: &str = "rwsplit";
/// What containerd dies of if a proxy has the name of a plugin of its own
/// (`plugin/plugin.go`, `ErrIDRegistered`).
const NAME_IS_TAKEN: &str = "id already registered";

pub(super) fn look(config: &Config, options: &DoctorOptions) -> Vec<Finding> {
    let version = match ask(options, &["--version"]) {
        Ok(said) => version_of(&said),
        Err(why) => {
            return vec![
                Finding::note(
                    "containerd",
                    format!(
                        "{why}; if it is part of something else (k3s, say), its configuration \
                         needs this"
                    ),
                )
                .with_stanza(stanza(config, 3)),
            ];
        }
    };
    let mut findings = vec![Finding::good("containerd", version)];
    let dumped = ask(options, &["config", "dump"]);
    let parsed = dumped.and_then(|text| text.parse::<Table>().map_err(|error| error.to_string()));
    match parsed {
        Ok(table) => findings.extend(judge(config, &table)),
        Err(why) => findings.push(Finding::bad(
            "plugin",
            format!("containerd's configuration cannot be read: {why}"),
        )),
    }
    findings
}

/// What containerd says when it is started with these words.
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
        // On some configurations it panics, and then prints where.
        let said = String::from_utf8_lossy(&output.stderr);
        let first = said.lines().find(|line| !line.trim().is_empty());
        let first = first.unwrap_or_default();
        let hint = match first.contains(NAME_IS_TAKEN) {
            true => format!(
                ": a proxy plugin has the name of one of containerd's own, call it {USUAL_NAME:?}"
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

/// `containerd github.com/containerd/containerd 1.7.2 <commit>`.
fn version_of(said: &str) -> String {
    said.split_whitespace()
        .nth(2)
        .unwrap_or("of an unknown version")
        .to_owned()
}

/// The value behind these keys.
fn at<'a>(table: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (last, tables) = path.split_last()?;
    let mut table = table;
    for key in tables {
        table = table.get(*key)?.as_table()?;
    }
    table.get(*last)
}

fn text_at<'a>(table: &'a Table, path: &[&str]) -> Option<&'a str> {
    at(table, path)?.as_str()
}

fn judge(config: &Config, table: &Table) -> Vec<Finding> {
    let version = at(table, &["version"])
        .and_then(Value::as_integer)
        .unwrap_or(1);
    let none = Table::new();
    let proxies = at(table, &["proxy_plugins"])
        .and_then(Value::as_table)
        .unwrap_or(&none);
    let is_ours = |proxy: &Value| {
        let address = proxy.get("address").and_then(Value::as_str);
        address.is_some_and(|address| address.trim_start_matches("unix://") == config.address)
    };
    let Some((name, proxy)) = proxies.iter().find(|(_, proxy)| is_ours(proxy)) else {
        return vec![missing(config, proxies, version)];
    };

    let mut findings = vec![plugin(name, proxy)];
    findings.extend(parallel_unpacking(proxy, mount::probe_user_namespace()));
    if version >= 3 {
        findings.push(unpacking(table, name));
        findings.push(exports(config, name, proxy));
    }
    findings.extend(kubernetes(config, table, name));
    findings
}

/// No proxy has our socket.
fn missing(config: &Config, proxies: &Table, version: i64) -> Finding {
    let others: Vec<_> = proxies
        .iter()
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
    .with_stanza(stanza(config, version))
}

fn plugin(name: &str, proxy: &Value) -> Finding {
    let kind = proxy.get("type").and_then(Value::as_str);
    if kind != Some("snapshot") {
        return Finding::bad(
            "plugin",
            format!(
                "the type of {} is {}, it has to be \"snapshot\"",
                Quoted(name),
                Quoted(kind.unwrap_or_default())
            ),
        );
    }
    Finding::good(
        "plugin",
        format!(
            "{} leads here, once containerd was restarted with it",
            Quoted(name)
        ),
    )
}

/// In a user namespace containerd does not write what a layer deletes unless the layer is
/// unpacked onto its parent.
fn parallel_unpacking(proxy: &Value, is_in_user_namespace: bool) -> Option<Finding> {
    let capabilities = proxy.get("capabilities").and_then(Value::as_array);
    let mut names = capabilities?.iter().filter_map(Value::as_str);
    (is_in_user_namespace && names.any(|name| name == "rebase")).then(|| {
        Finding::bad(
            "plugin",
            "images with several layers cannot be pulled in this user namespace: leave \"rebase\" \
             out of the capabilities",
        )
    })
}

/// containerd 2 unpacks what `ctr` and nerdctl pull only with an entry for it.
fn unpacking(table: &Table, name: &str) -> Finding {
    const TRANSFER: &str = "io.containerd.transfer.v1.local";
    let entries = at(table, &["plugins", TRANSFER, "unpack_config"]).and_then(Value::as_array);
    let is_there = entries.into_iter().flatten().any(|entry| {
        entry
            .get("snapshotter")
            .and_then(Value::as_str)
            .is_some_and(|snapshotter| snapshotter == name)
    });
    match is_there {
        true => Finding::good("unpacking", "ctr and nerdctl can pull for it"),
        false => Finding::note(
            "unpacking",
            "ctr and nerdctl can pull for it with --local only, as there is no unpack_config",
        )
        .with_stanza(unpack_stanza(name)),
    }
}

/// What the kubelet takes for the disk of images.
fn exports(config: &Config, name: &str, proxy: &Value) -> Finding {
    let root = proxy.get("exports").and_then(|exports| exports.get("root"));
    let root = root.and_then(Value::as_str);
    if root == Some(&config.root) {
        return Finding::good("exports", "the kubelet finds the image volume");
    }
    let is = root.map_or("is not set".to_owned(), |root| {
        format!("is {}", Quoted(root))
    });
    Finding::note(
        "exports",
        format!("exports.root {is}, so the kubelet looks at another disk for its images"),
    )
    .with_stanza(format!(
        "[proxy_plugins.{name}.exports]\n  root = \"{}\"\n",
        config.root
    ))
}

/// Which snapshotter pods get, where CRI is part of containerd.
fn kubernetes(config: &Config, table: &Table, name: &str) -> Option<Finding> {
    const TABLES: [&[&str]; 2] = [
        &["plugins", "io.containerd.cri.v1.images"],
        &["plugins", "io.containerd.grpc.v1.cri", "containerd"],
    ];
    let disabled = at(table, &["disabled_plugins"]).and_then(Value::as_array);
    let is_disabled = |plugin: &str| {
        let names = disabled.into_iter().flatten();
        names.filter_map(Value::as_str).any(|name| name == plugin)
    };
    let path = TABLES
        .into_iter()
        .find(|path| at(table, path).is_some() && !path.get(1).is_some_and(|it| is_disabled(it)))?;
    let within = at(table, path)?.as_table()?;
    let snapshotter = text_at(within, &["snapshotter"]).unwrap_or_default();
    if snapshotter != name {
        let quoted: Vec<_> = path
            .iter()
            .map(|key| match key.contains('.') {
                true => format!("\"{key}\""),
                false => (*key).to_owned(),
            })
            .collect();
        let stanza = format!("[{}]\n  snapshotter = \"{name}\"\n", quoted.join("."));
        return Some(
            Finding::note(
                "Kubernetes",
                format!("pods get the snapshotter {}", Quoted(snapshotter)),
            )
            .with_stanza(stanza),
        );
    }
    let hides = at(within, &["disable_snapshot_annotations"]).and_then(Value::as_bool);
    if hides == Some(true) && !config.options.lower_rules.is_empty() {
        return Some(Finding::bad(
            "Kubernetes",
            "--lower-for is in vain: disable_snapshot_annotations has to be false, so that \
             layers say which image they are of",
        ));
    }
    Some(Finding::good("Kubernetes", "pods get this snapshotter"))
}

/// What leads containerd here, in the version of its configuration.
fn stanza(config: &Config, version: i64) -> String {
    let plugin = format!(
        "[proxy_plugins.{USUAL_NAME}]\n  type = \"snapshot\"\n  address = \"{}\"\n",
        config.address
    );
    if version < 3 {
        return plugin;
    }
    format!(
        "{plugin}  [proxy_plugins.{USUAL_NAME}.exports]\n    root = \"{}\"\n\n{}",
        config.root,
        unpack_stanza(USUAL_NAME)
    )
}

fn unpack_stanza(name: &str) -> String {
    let machine = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!(
        "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  \
         platform = \"linux/{machine}\"\n  snapshotter = \"{name}\"\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::Verdict;
    use crate::config::{Parsed, parse};

    /// What is said of a configuration, by topic.
    fn judged(configuration: &str) -> Vec<(&'static str, Verdict, Finding)> {
        let arguments = ["--root-dir", "/big"].map(Into::into).to_vec();
        let Parsed::Run(config, _) = parse(arguments).unwrap() else {
            panic!("the daemon's flags");
        };
        let table = configuration.parse().unwrap();
        judge(&config, &table)
            .into_iter()
            .map(|finding| (finding.topic, finding.verdict, finding))
            .collect()
    }

    fn verdicts(configuration: &str) -> Vec<(&'static str, Verdict)> {
        let judged = judged(configuration).into_iter();
        judged.map(|(topic, verdict, _)| (topic, verdict)).collect()
    }

    const PROXY: &str = r#"
        version = 3
        [proxy_plugins.split]
          type = "snapshot"
          address = "unix:///big/grpc.socks"
    "#;

    #[test]
    fn of_containerd_2_more_is_asked() {
        let cri = "[plugins.\"io.containerd.cri.v1.images\"]\n snapshotter = \"overlayfs\"\n";
        let found = judged(&format!("{PROXY}{cri}"));
        let lacking = [
            ("plugin", Verdict::Good),
            ("unpacking", Verdict::Note),
            ("exports", Verdict::Note),
            ("Kubernetes", Verdict::Note),
        ];
        let mut stanzas = String::new();
        for ((topic, verdict, finding), expected) in found.into_iter().zip(lacking) {
            assert_eq!((topic, verdict), expected);
            stanzas.push_str(&finding.stanza.unwrap_or_default());
        }
        // With the lines that it gives there is nothing left to say.
        let all = verdicts(&format!("{PROXY}{stanzas}"));
        assert_eq!(all.len(), 4, "{all:?}");
        assert!(
            all.iter().all(|(_, verdict)| *verdict == Verdict::Good),
            "{all:?}"
        );
    }

    #[test]
    fn the_stanza_for_a_new_configuration_is_enough() {
        for version in [2, 3] {
            let found = judged(&format!("version = {version}\n"));
            let [(topic, verdict, finding)] = found.as_slice() else {
                panic!("one finding: {found:?}");
            };
            assert_eq!((*topic, *verdict), ("plugin", Verdict::Bad));
            let stanza = finding.stanza.as_deref().unwrap();
            let all = verdicts(&format!("version = {version}\n{stanza}"));
            assert!(
                all.iter().all(|(_, verdict)| *verdict == Verdict::Good),
                "{all:?}"
            );
            assert_eq!(all.len(), if version < 3 { 1 } else { 3 }, "{all:?}");
        }
    }

    #[test]
    fn a_cri_that_is_switched_off_is_not_asked() {
        let cri = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n snapshotter = \"x\"\n";
        let topics = |configuration: &str| -> Vec<_> {
            let verdicts = verdicts(configuration).into_iter();
            verdicts.map(|(topic, _)| topic).collect()
        };
        assert!(topics(&format!("{PROXY}{cri}")).contains(&"Kubernetes"));
        let off = "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n";
        assert!(!topics(&format!("{off}{PROXY}{cri}")).contains(&"Kubernetes"));
    }

    #[test]
    fn parallel_unpacking_is_no_good_in_a_user_namespace() {
        for (capabilities, is_in_user_namespace, is_bad) in [
            ("capabilities = [\"rebase\", \"remap-ids\"]", true, true),
            ("capabilities = [\"rebase\"]", false, false),
            ("capabilities = [\"remap-ids\"]", true, false),
            ("", true, false),
        ] {
            let proxy = Value::Table(capabilities.parse().unwrap());
            let found = parallel_unpacking(&proxy, is_in_user_namespace);
            let verdict = found.map(|finding| finding.verdict);
            assert_eq!(verdict, is_bad.then_some(Verdict::Bad), "{capabilities}");
        }
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(
            version_of("containerd github.com/containerd/containerd 1.7.2 0cae528\n"),
            "1.7.2"
        );
        assert_eq!(version_of(""), "of an unknown version");
    }
}
