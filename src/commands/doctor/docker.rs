//! Looks at Docker: whether its configuration names a snapshotter of its containerd. dockerd
//! uses the containerd that its configuration names. Without such a name, dockerd uses the
//! system's containerd if that is running, and otherwise starts one of its own, which has no
//! proxy plugins (moby `daemon/command/daemon_unix.go`).

use std::fs;
use std::path::Path;

use serde_json::Value as Json;
use toml::{Table, Value};

use super::Finding;
use super::containerd::at;
use crate::types::Quoted;

const SYSTEM_SOCKET: &str = "/run/containerd/containerd.sock";
const SETTINGS: &str = "/etc/docker/daemon.json";
/// Docker's storage drivers that are not snapshotters.
const GRAPH_DRIVERS: [&str; 8] = [
    "overlay2",
    "fuse-overlayfs",
    "vfs",
    "overlay",
    "aufs",
    "devicemapper",
    "btrfs",
    "zfs",
];
/// containerd's own snapshotters.
const OWN_SNAPSHOTTERS: [&str; 7] = [
    "overlayfs",
    "native",
    "btrfs",
    "zfs",
    "devmapper",
    "blockfile",
    "erofs",
];

/// What is known of Docker's configuration and processes.
#[derive(Default)]
struct Docker {
    /// The storage driver, from daemon.json and dockerd's own flags.
    driver: Option<String>,
    containerd: Option<String>,
    uses_snapshotters: Option<bool>,
    /// The process number of a containerd that dockerd has started.
    private_containerd: Option<u32>,
    has_system_socket: bool,
}

/// Looks at Docker, if it is installed. `name` is containerd's name for this
/// snapshotter.
pub(super) fn look(table: &Table, name: Option<&str>) -> Option<Finding> {
    match find() {
        Ok(docker) => judge(&docker?, table, name),
        Err(why) => Some(Finding::note("Docker", why)),
    }
}

fn find() -> Result<Option<Docker>, String> {
    let processes = processes();
    let dockerd = processes.iter().find(|process| process.name == "dockerd");
    let words = dockerd
        .map(|dockerd| dockerd.words.as_slice())
        .unwrap_or_default();
    let path = flag(words, &["--config-file"]).unwrap_or(SETTINGS.to_owned());
    let settings = match fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text)
            .map_err(|error| format!("{path} cannot be read: {error}"))?,
        Err(_) if dockerd.is_none() => return Ok(None),
        Err(_) => Json::Null,
    };
    let text = |key: &str| settings.get(key).and_then(Json::as_str).map(str::to_owned);
    let features = settings.get("features");
    let is_private = |process: &&Process| {
        process.name == "containerd" && dockerd.is_some_and(|dockerd| process.parent == dockerd.id)
    };
    Ok(Some(Docker {
        driver: text("storage-driver").or_else(|| flag(words, &["--storage-driver", "-s"])),
        containerd: text("containerd").or_else(|| flag(words, &["--containerd"])),
        uses_snapshotters: features
            .and_then(|features| features.get("containerd-snapshotter"))
            .and_then(Json::as_bool),
        private_containerd: processes.iter().find(is_private).map(|process| process.id),
        has_system_socket: Path::new(SYSTEM_SOCKET).exists(),
    }))
}

fn judge(docker: &Docker, table: &Table, name: Option<&str>) -> Option<Finding> {
    let driver = docker.driver.as_deref()?;
    let proxies = at(table, &["proxy_plugins"]).and_then(Value::as_table);
    let is_proxy = proxies.is_some_and(|proxies| proxies.contains_key(driver));
    if GRAPH_DRIVERS.contains(&driver) && !is_proxy {
        let text = format!(
            "Docker does not use this snapshotter: its storage-driver is {}, which is not the \
             name of a snapshotter",
            Quoted(driver)
        );
        return Some(Finding::note("Docker", text));
    }
    let cure = format!("\"containerd\": {SYSTEM_SOCKET:?} in {SETTINGS}, and restart Docker");
    if let Some(process) = docker.private_containerd {
        return Some(Finding::bad(
            "Docker",
            format!(
                "Docker uses a containerd that it has started itself (process {process}), which \
                 has no proxy plugins and so no snapshotter {}: set {cure}",
                Quoted(driver)
            ),
        ));
    }
    if docker.containerd.is_none() && !docker.has_system_socket {
        return Some(Finding::bad(
            "Docker",
            format!(
                "no containerd serves on {SYSTEM_SOCKET}, so Docker starts one of its own, which \
                 has no snapshotter {} (\"configured driver … not available\"): start the \
                 system's containerd, set {cure}",
                Quoted(driver)
            ),
        ));
    }
    if let Some(address) = &docker.containerd
        && address.trim_start_matches("unix://") != SYSTEM_SOCKET
    {
        let text = format!(
            "Docker uses the containerd on {address}: give the configuration file of that \
             containerd with --containerd-config"
        );
        return Some(Finding::note("Docker", text));
    }
    if !is_proxy && !OWN_SNAPSHOTTERS.contains(&driver) {
        return Some(Finding::bad(
            "Docker",
            format!(
                "Docker's storage-driver is {}, but containerd has no snapshotter of that name{}",
                Quoted(driver),
                name.map_or(String::new(), |name| format!(
                    ": this one is called {}",
                    Quoted(name)
                ))
            ),
        ));
    }
    if docker.uses_snapshotters == Some(false) {
        return Some(Finding::bad(
            "Docker",
            format!(
                "Docker's storage-driver {} is a snapshotter, but the feature \
                 \"containerd-snapshotter\" is switched off in {SETTINGS}: switch it on",
                Quoted(driver)
            ),
        ));
    }
    Some(match name == Some(driver) {
        true => Finding::good("Docker", "Docker uses this snapshotter"),
        false => Finding::note(
            "Docker",
            format!("Docker uses the snapshotter {}", Quoted(driver)),
        ),
    })
}

/// A process, as /proc shows it.
struct Process {
    id: u32,
    parent: u32,
    name: String,
    words: Vec<String>,
}

fn processes() -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter_map(process).collect()
}

fn process(id: u32) -> Option<Process> {
    let read = |name| fs::read_to_string(format!("/proc/{id}/{name}")).ok();
    let status = read("status")?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    Some(Process {
        id,
        parent: field("PPid:")?.trim().parse().ok()?,
        name: field("Name:")?.trim().to_owned(),
        words: read("cmdline")?.split('\0').map(str::to_owned).collect(),
    })
}

/// The value of a flag on a command line. `names` are all spellings of the flag.
fn flag(words: &[String], names: &[&str]) -> Option<String> {
    let mut words = words.iter();
    while let Some(word) = words.next() {
        for name in names {
            match word.strip_prefix(name) {
                Some("") => return words.next().cloned(),
                Some(value) if value.starts_with('=') => return Some(value[1..].to_owned()),
                _ => {}
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::Verdict::{self, Bad, Good, Note};

    fn docker(driver: &str) -> Docker {
        Docker {
            driver: Some(driver.to_owned()),
            has_system_socket: true,
            ..Docker::default()
        }
    }

    fn verdict(docker: &Docker) -> Option<(Verdict, String)> {
        let table = "[proxy_plugins.split]\ntype = \"snapshot\"\n"
            .parse()
            .unwrap();
        let finding = judge(docker, &table, Some("split"))?;
        Some((finding.verdict, finding.text))
    }

    #[test]
    fn a_driver_that_its_containerd_does_not_have_is_bad() {
        let with = |change: fn(&mut Docker)| {
            let mut docker = docker("split");
            change(&mut docker);
            docker
        };
        for (docker, expected, words) in [
            (docker("split"), Good, "Docker uses this snapshotter"),
            (docker("overlayfs"), Note, "\"overlayfs\""),
            (docker("overlay2"), Note, "not the name of a snapshotter"),
            (docker("rws"), Bad, "this one is called \"split\""),
            (
                with(|it| it.private_containerd = Some(7)),
                Bad,
                "(process 7)",
            ),
            (
                with(|it| it.has_system_socket = false),
                Bad,
                "one of its own",
            ),
            (
                with(|it| it.uses_snapshotters = Some(false)),
                Bad,
                "switched off",
            ),
            (
                with(|it| it.containerd = Some("/run/x".to_owned())),
                Note,
                "/run/x",
            ),
            (
                with(|it| {
                    it.containerd = Some(SYSTEM_SOCKET.to_owned());
                    it.has_system_socket = false;
                }),
                Good,
                "",
            ),
        ] {
            let (verdict, text) = verdict(&docker).unwrap();
            assert_eq!(verdict, expected, "{text}");
            assert!(text.contains(words), "{text}");
        }
        assert_eq!(verdict(&Docker::default()), None);
    }

    #[test]
    fn flags_have_values_in_two_ways() {
        let words = [
            "dockerd",
            "--containerd=/a",
            "-s",
            "b",
            "--storage-drivers",
            "c",
        ];
        let words = words.map(str::to_owned);
        assert_eq!(flag(&words, &["--containerd"]).as_deref(), Some("/a"));
        assert_eq!(
            flag(&words, &["--storage-driver", "-s"]).as_deref(),
            Some("b")
        );
        assert_eq!(flag(&words, &["--config-file"]), None);
    }
}
