//! Looks at Kubernetes: whether pods get this snapshotter, whether their images can be pulled
//! for this snapshotter, and which disk the kubelet takes for the disk of images.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use toml::{Table, Value};

use super::Finding;
use super::containerd::{Version, at, text_at, unpack_stanza};
use crate::config::Config;
use crate::types::Quoted;

const TRANSFER: &str = "io.containerd.transfer.v1.local";

/// The configuration of containerd's CRI plugin.
struct Cri<'a> {
    /// The keys of the table that contains the snapshotter.
    path: &'static [&'static str],
    table: &'a Table,
    /// Every snapshotter that pods get: the default one, and those of runtimes that
    /// choose another.
    snapshotters: BTreeSet<&'a str>,
}

impl<'a> Cri<'a> {
    /// Finds the configuration of CRI. Returns `None` if this containerd has no CRI, or CRI is
    /// switched off.
    fn find(table: &'a Table) -> Option<Cri<'a>> {
        const TABLES: [&[&str]; 2] = [
            &["plugins", "io.containerd.cri.v1.images"],
            &["plugins", "io.containerd.grpc.v1.cri", "containerd"],
        ];
        let disabled = at(table, &["disabled_plugins"]).and_then(Value::as_array);
        let is_disabled = |plugin: &str| {
            let names = disabled.into_iter().flatten();
            names.filter_map(Value::as_str).any(|name| name == plugin)
        };
        let path = TABLES.into_iter().find(|path| {
            at(table, path).is_some() && !path.get(1).is_some_and(|it| is_disabled(it))
        })?;
        let within = at(table, path)?.as_table()?;
        let of_runtimes = ["runtimes", "runtime_platforms"].into_iter();
        let of_runtimes = of_runtimes.filter_map(|key| within.get(key)?.as_table());
        let of_runtimes = of_runtimes.flat_map(Table::values);
        let mut snapshotters: BTreeSet<_> = of_runtimes
            .filter_map(|runtime| runtime.get("snapshotter")?.as_str())
            .filter(|snapshotter| !snapshotter.is_empty())
            .collect();
        snapshotters.extend(text_at(within, &["snapshotter"]));
        Some(Cri {
            path,
            table: within,
            snapshotters,
        })
    }

    fn is(&self, key: &str) -> Option<bool> {
        self.table.get(key).and_then(Value::as_bool)
    }

    /// Whether CRI pulls images with the transfer service, which unpacks only for the
    /// snapshotters in a list of its own. CRI does so in containerd 2.1 and later, unless it is
    /// configured to pull by itself, or has a setting that the transfer service does not
    /// support.
    fn pulls_by_transfer(&self, version: Version) -> bool {
        version >= Version(2, 1, 0)
            && self.is("use_local_image_pull") != Some(true)
            && self.is("disable_snapshot_annotations") != Some(false)
            && self.is("discard_unpacked_layers") != Some(true)
    }
}

/// Looks at the configuration of a containerd, whose proxy plugin `name` leads to this program.
pub(super) fn look(
    config: &Config,
    table: &Table,
    version: Version,
    name: &str,
    proxy: &Value,
) -> Vec<Finding> {
    let cri = Cri::find(table);
    let has_pods = |cri: &Cri<'_>| cri.snapshotters.contains(name);
    let is_for_pods = cri.as_ref().is_some_and(has_pods);
    let mut findings = Vec::new();
    if version >= Version(2, 0, 0) {
        findings.push(unpacking(table, version, name, cri.as_ref()));
    }
    if cri.is_some() || version >= Version(2, 0, 0) {
        findings.push(exports(config, table, version, (name, proxy), is_for_pods));
    }
    if let Some(cri) = &cri {
        findings.push(snapshotter(config, cri, name));
        if is_for_pods && cri.is("discard_unpacked_layers") == Some(true) {
            findings.push(discarded(config, table, name));
        }
    }
    findings
}

/// Checks whether images can be pulled for every snapshotter in use. Without any
/// `unpack_config`, containerd creates one for overlayfs. Otherwise, only the configured ones
/// count.
fn unpacking(table: &Table, version: Version, name: &str, cri: Option<&Cri<'_>>) -> Finding {
    let entries = at(table, &["plugins", TRANSFER, "unpack_config"]).and_then(Value::as_array);
    let given: BTreeSet<&str> = entries
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.get("snapshotter")?.as_str())
        .collect();
    let is_served = |name: &str| match given.is_empty() {
        true => name == "overlayfs",
        false => given.contains(name),
    };
    let cri = cri.filter(|cri| cri.pulls_by_transfer(version));
    let used = cri
        .into_iter()
        .flat_map(|cri| cri.snapshotters.iter().copied());
    let unserved = used.clone().find(|used| !is_served(used));
    let wanted: BTreeSet<&str> = used.chain(["overlayfs", name]).collect();
    let stanza = unpack_stanza(wanted.into_iter().filter(|name| !given.contains(name)));
    if let Some(unserved) = unserved {
        return Finding::bad(
            "unpacking",
            format!(
                "pods get the snapshotter {}, and their images cannot be pulled (\"no unpack \
                 platforms defined\"), because this snapshotter has no unpack_config",
                Quoted(unserved)
            ),
        )
        .with_stanza(stanza);
    }
    match (is_served(name), is_served("overlayfs")) {
        (true, true) => Finding::good("unpacking", "images can be pulled for this snapshotter"),
        (true, false) => Finding::note(
            "unpacking",
            "images can be pulled for this snapshotter, but not for overlayfs any more: as soon \
             as there is one unpack_config, overlayfs needs one too",
        )
        .with_stanza(stanza),
        (false, _) => Finding::note(
            "unpacking",
            "ctr and nerdctl can pull for this snapshotter only with --local, because there is no \
             unpack_config for it",
        )
        .with_stanza(stanza),
    }
}

/// Checks which disk the kubelet takes for the disk of images: that of the directory
/// `exports.root`, or that of a directory in containerd's root.
fn exports(
    config: &Config,
    table: &Table,
    version: Version,
    (name, proxy): (&str, &Value),
    is_for_pods: bool,
) -> Finding {
    let root = proxy.get("exports").and_then(|exports| exports.get("root"));
    let root = root.and_then(Value::as_str);
    let is_known = version >= Version(2, 0, 0)
        || version >= Version(1, 7, 16)
        || (version >= Version(1, 6, 32) && version < Version(1, 7, 0));
    let containerd_root = text_at(table, &["root"]).unwrap_or("/var/lib/containerd");
    let link = format!("{containerd_root}/io.containerd.snapshotter.v1.{name}");
    if (is_known && root == Some(&config.root)) || leads_to(&link, &config.root) {
        return Finding::good("exports", "the kubelet finds the image volume");
    }
    let (why, cure) = if is_known {
        let is = root.map_or("is not set".to_owned(), |root| {
            format!("is {}", Quoted(root))
        });
        let stanza = format!(
            "[proxy_plugins.{name}.exports]\n  root = \"{}\"\n",
            config.root
        );
        (format!("exports.root {is}"), stanza)
    } else {
        let command = format!(
            "# this containerd has no exports; in a shell:\n# ln -s {} {link}\n",
            config.root
        );
        (format!("{link} does not lead to {}", config.root), command)
    };
    let verdict = match is_for_pods {
        true => Finding::bad,
        false => Finding::note,
    };
    let text = format!(
        "{why}, so the kubelet looks at another disk for its images (\"invalid capacity 0 on \
         image filesystem\"), removes none when the disk fills, and enforces no limits of pods"
    );
    verdict("exports", text).with_stanza(cure)
}

/// Whether a link leads to a directory, which may not exist yet.
fn leads_to(link: &str, directory: &str) -> bool {
    let found = |path| fs::canonicalize(path).ok();
    fs::read_link(link).is_ok_and(|target| target == Path::new(directory))
        || found(link).is_some_and(|link| Some(link) == found(directory))
}

/// Checks which snapshotter pods get.
fn snapshotter(config: &Config, cri: &Cri<'_>, name: &str) -> Finding {
    let default = text_at(cri.table, &["snapshotter"]).unwrap_or_default();
    if !cri.snapshotters.contains(name) {
        let quoted: Vec<_> = cri
            .path
            .iter()
            .map(|key| match key.contains('.') {
                true => format!("\"{key}\""),
                false => (*key).to_owned(),
            })
            .collect();
        let stanza = format!("[{}]\n  snapshotter = \"{name}\"\n", quoted.join("."));
        let text = format!(
            "pods get the snapshotter {}, and not this one",
            Quoted(default)
        );
        return Finding::note("Kubernetes", text).with_stanza(stanza);
    }
    let hides = cri.is("disable_snapshot_annotations") == Some(true);
    if hides && !config.options.lower_rules.is_empty() {
        return Finding::bad(
            "Kubernetes",
            "--lower-for has no effect: disable_snapshot_annotations has to be false, so that \
             the labels of layers name their image",
        );
    }
    Finding::good(
        "Kubernetes",
        match default == name {
            true => "pods get this snapshotter",
            false => "pods of some runtimes get this snapshotter",
        },
    )
}

/// Warns of images without content. Images that were pulled for another snapshotter
/// cannot be unpacked for this one once their layers' content is deleted. If there are
/// such images, and none for this snapshotter, containerd has just been switched over.
fn discarded(config: &Config, table: &Table, name: &str) -> Finding {
    let root = text_at(table, &["root"]).unwrap_or("/var/lib/containerd");
    let ours = Path::new(&*config.root).join("snapshots");
    let plugins = fs::read_dir(root).into_iter().flatten().flatten();
    let others = plugins.filter(|entry| {
        let file_name = entry.file_name();
        let plugin = file_name.to_string_lossy();
        let other = plugin.strip_prefix("io.containerd.snapshotter.v1.");
        other.is_some_and(|other| other != name) && has_entries(&entry.path().join("snapshots"))
    });
    let text = "discard_unpacked_layers is true: images that were pulled for another snapshotter \
                have no content left to be unpacked for this one, and their pods do not start \
                (\"content digest … not found\"): pull each image once more (crictl pull IMAGE), \
                the pause image first";
    match others.count() > 0 && !has_entries(&ours) {
        true => Finding::bad("images", text),
        false => Finding::note("images", text),
    }
}

fn has_entries(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some())
}
