//! Checking whether a file system can hold layers.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, RenameFlags, XattrFlags, mknodat, renameat_with, setxattr};

use super::{LOWER, MERGED, Overlay, Stack, make_directory, require_entry_types, unsuitable};
use crate::error::{Context, Result};

/// Checks that `scratch`, an empty directory, is on a file system that can hold image
/// layers: whiteouts and opaque directories can be created, overlayfs accepts directories
/// there as lower directories, and a directory and a link can exchange their names, as
/// they do when a layer moves.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition), which
/// names the step that did not work.
pub fn probe_layers(scratch: &Path, options: &[String]) -> Result<()> {
    let (lower, other, merged) = (
        scratch.join(LOWER),
        scratch.join("other"),
        scratch.join(MERGED),
    );
    for directory in [&lower, &other, &merged] {
        make_directory(directory)?;
    }
    require_entry_types(scratch)?;
    let whiteout = lower.join("deleted");
    mknodat(CWD, &whiteout, FileType::CharacterDevice, Mode::empty(), 0)
        .map_err(|errno| unsuitable("create a whiteout (a device node 0,0)".to_owned(), errno))?;
    let namespace = match options.iter().any(|option| option == "userxattr") {
        true => "user",
        false => "trusted",
    };
    let opaque = format!("{namespace}.overlay.opaque");
    setxattr(&lower, &*opaque, b"y", XattrFlags::empty())
        .map_err(|errno| unsuitable(format!("set the attribute {opaque}"), errno))?;
    let link = scratch.join("link");
    symlink("other", &link).context(|| format!("create the link {}", link.display()))?;
    renameat_with(CWD, &other, CWD, &link, RenameFlags::EXCHANGE).map_err(|errno| {
        let what = "exchange two names (renameat2(2), RENAME_EXCHANGE)";
        unsuitable(what.to_owned(), errno)
    })?;
    let path = |path: &Path| path.display().to_string();
    let stack = Stack {
        source: "overlay",
        base: None,
        lowers: &[path(&lower), path(&link)],
        own: None,
        options,
    };
    let target = File::open(&merged).context(|| format!("open {}", merged.display()))?;
    stack.mount(target, &merged)?;
    let _mounted = Overlay {
        target: merged.clone(),
    };
    fs::read_dir(&merged)
        .map(drop)
        .context(|| format!("list {}", merged.display()))
}
