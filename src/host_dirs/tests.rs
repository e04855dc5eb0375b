use super::*;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

/// Creates `allowed/` with some entries, `own/`, and `outside/`.
fn place() -> (tempfile::TempDir, Policy) {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for name in ["allowed/there", "own/snapshots/1/fs", "outside"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    let policy = Policy {
        allowed: vec![at("allowed")],
        kept_apart: vec![at("own"), at("not there")],
    };
    (dir, policy)
}

fn ask(policy: &Policy, dir: &Path, names: &[&str]) -> Result<Vec<PathBuf>> {
    let paths: Vec<_> = names
        .iter()
        .map(|name| dir.join(name).to_str().unwrap().to_owned())
        .collect();
    let lowers = policy.ensure(&paths)?;
    let targets = lowers.targets().to_vec();
    lowers.keep();
    Ok(targets)
}

#[test]
fn what_is_missing_is_created_and_taken_back() {
    let (dir, policy) = place();
    let wanted = dir.path().join("allowed/new/deep");
    let paths = [wanted.to_str().unwrap().to_owned()];
    policy.check(&paths).unwrap();
    drop(policy.ensure(&paths).unwrap());
    assert!(!dir.path().join("allowed/new").exists());
    let lowers = policy.ensure(&paths).unwrap();
    assert_eq!(lowers.targets(), [fs::canonicalize(&wanted).unwrap()]);
    lowers.keep();
    let mode = fs::metadata(&wanted).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o755);
}

#[test]
fn links_are_followed_as_long_as_they_stay() {
    let (dir, policy) = place();
    let allowed = dir.path().join("allowed");
    let there = fs::canonicalize(allowed.join("there")).unwrap();
    symlink("there", allowed.join("relative")).unwrap();
    symlink(allowed.join("there"), allowed.join("absolute")).unwrap();
    symlink("./there/../relative", allowed.join("roundabout")).unwrap();
    for name in ["relative", "absolute", "roundabout", "there", "absolute/."] {
        let targets = ask(&policy, dir.path(), &[&format!("allowed/{name}")]).unwrap();
        assert_eq!(targets, std::slice::from_ref(&there), "{name}");
    }
    symlink("../outside", allowed.join("out")).unwrap();
    symlink("/", allowed.join("top")).unwrap();
    symlink(dir.path().join("outside"), allowed.join("away")).unwrap();
    symlink("there/../../outside", allowed.join("around")).unwrap();
    symlink("loop", allowed.join("loop")).unwrap();
    symlink("nothing", allowed.join("dangling")).unwrap();
    symlink("/proc/self/root", allowed.join("magic")).unwrap();
    fs::write(allowed.join("file"), "").unwrap();
    for name in [
        "out",
        "out/new",
        "top",
        "top/tmp",
        "away",
        "around",
        "loop",
        "magic",
        "file",
        "file/x",
        "magic/tmp",
    ] {
        let error = ask(&policy, dir.path(), &[&format!("allowed/{name}")]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{name}");
    }
    assert!(
        fs::read_dir(dir.path().join("outside"))
            .unwrap()
            .next()
            .is_none()
    );
    // A link to a missing name below the allowed directory is followed like any other link.
    ask(&policy, dir.path(), &["allowed/dangling/x"]).unwrap();
    assert!(allowed.join("nothing/x").is_dir());
}

#[test]
fn only_the_allowed_directory_that_a_path_begins_with_is_opened() {
    let (dir, _) = place();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    symlink("allowed", dir.path().join("alias")).unwrap();
    let allowed = [at("outside"), at("alias"), at("own")];
    let opened = |path: &str| {
        let mut starts = Starts::new(&allowed);
        let reached = starts.reach(&at(path)).map(|(number, _)| number);
        let opened: Vec<_> = starts.opened.iter().map(Option::is_some).collect();
        (reached.map_err(|error| error.kind()), opened)
    };
    assert_eq!(opened("alias/there"), (Ok(1), vec![false, true, false]));
    assert_eq!(opened("own/x"), (Ok(2), vec![false, false, true]));
    // The allowed directory may also be named by its path without links.
    assert_eq!(opened("allowed/there").0, Ok(1));
    let refused = Err(ErrorKind::InvalidArgument);
    assert_eq!(opened("elsewhere"), (refused, vec![true; 3]));
}

#[test]
fn the_allowed_directory_may_be_a_link_itself() {
    let (dir, mut policy) = place();
    symlink("allowed", dir.path().join("alias")).unwrap();
    let there = fs::canonicalize(dir.path().join("allowed/there")).unwrap();
    policy.allowed = vec![dir.path().join("alias").to_str().unwrap().to_owned()];
    for name in ["alias/there", "allowed/there"] {
        let targets = ask(&policy, dir.path(), &[name]).unwrap();
        assert_eq!(targets, std::slice::from_ref(&there));
    }
    policy.allowed = vec![dir.path().join("gone").to_str().unwrap().to_owned()];
    let error = ask(&policy, dir.path(), &["gone/x"]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(!dir.path().join("gone").exists());
}

#[test]
fn the_snapshotters_own_is_kept_apart() {
    let (dir, mut policy) = place();
    policy.allowed = vec![dir.path().to_str().unwrap().to_owned()];
    for name in ["own", "own/snapshots/1/fs", "own/new", "."] {
        let error = ask(&policy, dir.path(), &[name]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{name}");
        assert!(error.chain().contains("its own data"), "{}", error.chain());
    }
    assert!(!dir.path().join("own/new").exists());
    ask(&policy, dir.path(), &["new"]).unwrap();
}

#[test]
fn directories_are_taken_once_and_not_in_each_other() {
    let (dir, policy) = place();
    let targets = ask(
        &policy,
        dir.path(),
        &["allowed/b", "allowed/a", "allowed/b"],
    )
    .unwrap();
    let names: Vec<_> = targets
        .iter()
        .map(|path| path.file_name().unwrap())
        .collect();
    assert_eq!(names, ["b", "a"]);
    let error = ask(&policy, dir.path(), &["allowed/n", "allowed/n/m"]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(!dir.path().join("allowed/n").exists());
}

#[test]
fn none_are_allowed_unless_named() {
    let (dir, policy) = place();
    let off = Policy {
        allowed: Vec::new(),
        ..policy.clone()
    };
    let error = ask(&off, dir.path(), &["allowed/there"]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.chain().contains("--allow-lower"), "{}", error.chain());
    assert!(ask(&off, dir.path(), &[]).unwrap().is_empty());
    let error = ask(&policy, dir.path(), &["allowedly"]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(!dir.path().join("allowedly").exists());
}
