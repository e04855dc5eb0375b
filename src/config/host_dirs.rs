//! Checks the flags that say which host directories containers may see.

use super::paths::check_path;
use crate::error::{Context, Error, Result};
use crate::host_dirs::{ImageRule, strip_prefix};

/// Mount options with which an upper directory refers to files in the lower directories. Host
/// directories change, so the files may be different ones at the next mount (overlayfs.rst,
/// "Changes to underlying filesystems").
const TIED: &[&str] = &[
    "index=on",
    "nfs_export=on",
    "metacopy=on",
    "redirect_dir=on",
];

/// Checks `--allow-lower` and `--lower-for` as far as possible without looking
/// at the disks: links are followed only when a directory is used.
pub(super) fn check(
    allowed: &[String],
    rules: &[String],
    mount_options: &[String],
) -> Result<(Vec<String>, Vec<ImageRule>)> {
    let allowed: Vec<_> = allowed
        .iter()
        .map(|prefix| check_path("--allow-lower", prefix).map(|path| path.to_string()))
        .collect::<Result<_>>()?;
    let rules: Vec<_> = rules
        .iter()
        .map(|rule| ImageRule::parse(rule).context(|| "read --lower-for"))
        .collect::<Result<_>>()?;
    let is_allowed = |path: &&String| {
        allowed
            .iter()
            .any(|prefix| strip_prefix(path, prefix).is_some())
    };
    let paths = || rules.iter().flat_map(ImageRule::paths);
    if let Some(path) = paths().find(|path| !is_allowed(path)) {
        return Err(Error::invalid(format!(
            "--lower-for names {path:?}, which no --allow-lower allows: give --allow-lower \
             {path:?}, or a directory above it"
        )));
    }
    let tied = |option: &&String| TIED.contains(&option.as_str());
    if !allowed.is_empty()
        && let Some(option) = mount_options.iter().find(tied)
    {
        return Err(Error::invalid(format!(
            "--mount-option {option} makes a container's upper directory depend on files of its \
             lower directories, and host directories change: this option cannot be given with \
             --allow-lower"
        )));
    }
    Ok((allowed, rules))
}
