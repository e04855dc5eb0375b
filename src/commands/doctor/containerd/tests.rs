use super::*;
use crate::commands::doctor::Verdict;
use crate::config::{Parsed, parse};

/// The findings about a configuration, by topic.
fn judged(configuration: &str, version: Version) -> Vec<(&'static str, Verdict, Finding)> {
    let arguments = ["--root-dir", "/big"].map(Into::into).to_vec();
    let Parsed::Run(config, _) = parse(arguments).unwrap() else {
        panic!("the daemon's flags");
    };
    let table = configuration.parse().unwrap();
    judge(&config, &table, version)
        .into_iter()
        .map(|finding| (finding.topic, finding.verdict, finding))
        .collect()
}

fn verdicts(configuration: &str, version: Version) -> Vec<(&'static str, Verdict)> {
    let judged = judged(configuration, version).into_iter();
    judged.map(|(topic, verdict, _)| (topic, verdict)).collect()
}

const V1: Version = Version(1, 7, 24);
const V2: Version = Version(2, 3, 4);
const PROXY: &str = r#"
        version = 3
        [proxy_plugins.split]
          type = "snapshot"
          address = "unix:///big/grpc.socks"
    "#;

#[test]
fn of_containerd_2_more_is_asked() {
    let cri = "[plugins.\"io.containerd.cri.v1.images\"]\n snapshotter = \"overlayfs\"\n";
    let found = judged(&format!("{PROXY}{cri}"), V2);
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
    // With the suggested lines, there are no more suggestions.
    let all = verdicts(&format!("{PROXY}{stanzas}"), V2);
    assert_eq!(all.len(), 4, "{all:?}");
    assert!(
        all.iter().all(|(_, verdict)| *verdict == Verdict::Good),
        "{all:?}"
    );
}

#[test]
fn pods_whose_images_cannot_be_pulled_are_bad() {
    let entry = |name| unpack_stanza([name].into_iter());
    let cri = |name: &str, more: &str| {
        format!("[plugins.\"io.containerd.cri.v1.images\"]\n snapshotter = \"{name}\"\n{more}\n")
    };
    let kata = "[plugins.\"io.containerd.cri.v1.images\".runtime_platforms.kata]\n \
                    snapshotter = \"split\"\n";
    use Verdict::{Bad, Good, Note};
    for (text, version, expected) in [
        (cri("split", ""), V2, Bad),
        (cri("split", "") + &entry("split"), V2, Note),
        (cri("overlayfs", "") + &entry("split"), V2, Bad),
        (
            cri("other", "") + &entry("split") + &entry("overlayfs"),
            V2,
            Bad,
        ),
        (cri("overlayfs", "") + kata, V2, Bad),
        (
            cri("split", "") + &entry("split") + &entry("overlayfs"),
            V2,
            Good,
        ),
        // These versions and settings of containerd pull by themselves.
        (cri("split", "use_local_image_pull = true"), V2, Note),
        (
            cri("split", "disable_snapshot_annotations = false"),
            V2,
            Note,
        ),
        (cri("split", ""), Version(2, 0, 4), Note),
        // Without any entry, containerd makes one for overlayfs.
        (cri("overlayfs", ""), V2, Note),
    ] {
        let found = verdicts(&format!("{PROXY}{text}"), version);
        let unpacking = found.iter().find(|(topic, _)| *topic == "unpacking");
        assert_eq!(unpacking, Some(&("unpacking", expected)), "{text}");
    }
}

#[test]
fn a_kubelet_that_looks_elsewhere_is_bad() {
    let root = tempfile::tempdir().unwrap();
    let link = root.path().join("io.containerd.snapshotter.v1.split");
    let text = |more: &str| {
        format!(
            "root = \"{}\"\n{PROXY}{more}\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n snapshotter = \"split\"\n",
            root.path().display()
        )
    };
    let of = |more: &str, version| {
        let found = judged(&text(more), version).into_iter();
        let mut found = found.filter(|(topic, ..)| *topic == "exports");
        let (_, verdict, finding) = found.next().unwrap();
        (verdict, finding.stanza.unwrap_or_default())
    };
    let exports = "[proxy_plugins.split.exports]\n root = \"/big\"\n";
    assert_eq!(
        of("", V1),
        (Verdict::Bad, exports.replace(" root", "  root"))
    );
    assert_eq!(of(exports, V1).0, Verdict::Good);
    // This version does not know `exports`.
    let (verdict, stanza) = of(exports, Version(1, 6, 20));
    assert!(
        verdict == Verdict::Bad && stanza.contains("ln -s /big "),
        "{stanza}"
    );
    std::os::unix::fs::symlink("/", &link).unwrap();
    assert_eq!(of("", Version(1, 6, 20)).0, Verdict::Bad);
}

#[test]
fn images_without_content_are_bad_until_one_is_unpacked_here() {
    let root = tempfile::tempdir().unwrap();
    let text = format!(
        "root = \"{}\"\n{PROXY}[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n \
             snapshotter = \"split\"\n discard_unpacked_layers = true\n",
        root.path().display()
    );
    let of_images = || {
        let found = verdicts(&text, V1);
        found
            .into_iter()
            .find(|(topic, _)| *topic == "images")
            .unwrap()
            .1
    };
    assert_eq!(of_images(), Verdict::Note);
    let other = "io.containerd.snapshotter.v1.overlayfs/snapshots/1";
    fs::create_dir_all(root.path().join(other)).unwrap();
    assert_eq!(of_images(), Verdict::Bad);
}

#[test]
fn the_stanza_for_a_new_configuration_is_enough() {
    for (version, containerd) in [(2, V1), (3, V2)] {
        let found = judged(&format!("version = {version}\n"), containerd);
        let [(topic, verdict, finding)] = found.as_slice() else {
            panic!("one finding: {found:?}");
        };
        assert_eq!((*topic, *verdict), ("plugin", Verdict::Bad));
        let stanza = finding.stanza.as_deref().unwrap();
        let all = verdicts(&format!("version = {version}\n{stanza}"), containerd);
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
        let verdicts = verdicts(configuration, V2).into_iter();
        verdicts.map(|(topic, _)| topic).collect()
    };
    assert!(topics(&format!("{PROXY}{cri}")).contains(&"Kubernetes"));
    let off = "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n";
    assert!(!topics(&format!("{off}{PROXY}{cri}")).contains(&"Kubernetes"));
}

#[test]
fn mapped_ids_need_a_later_containerd() {
    let Parsed::Run(config, _) = parse(["--root-dir", "/big"].map(Into::into).to_vec()).unwrap()
    else {
        panic!("the daemon's flags");
    };
    for (capabilities, version, is_bad) in [
        ("capabilities = [\"rebase\", \"remap-ids\"]", V1, true),
        ("capabilities = [\"remap-ids\"]", Version(2, 1, 9), true),
        ("capabilities = [\"remap-ids\"]", Version(2, 2, 0), false),
        ("capabilities = [\"rebase\"]", V1, false),
        ("", V1, false),
    ] {
        let table = format!("{PROXY}{capabilities}").parse().unwrap();
        let found = mapped_ids(&config, &table, version);
        assert_eq!(found.is_some(), is_bad, "{capabilities} {version:?}");
    }
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
    assert_eq!(Version::parse("v2.1.0-rc.1"), Version(2, 1, 0));
    assert_eq!(Version::parse("1.6.20~ds1"), Version(1, 6, 20));
    assert!(Version::parse("unknown") > V2);
}
