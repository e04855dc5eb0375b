//! The configuration of a snapshotter, from the command line.

use std::time::Duration;

use crate::host_dirs::{ImageRule, Policy};
use crate::mount;
use crate::quota::ProjectRange;
#[cfg(doc)]
use crate::snapshotter::Snapshotter;
#[cfg(doc)]
use crate::types::LABEL_UPPERDIR;
use crate::types::Limits;
use crate::volume::Reserve;

/// When a layer's data is made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// Before its Commit is answered.
    AtCommit,
    /// When the kernel writes it.
    Never,
}

/// What happens to layers that were committed on the writable volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relocation {
    /// They move to the image volume, no earlier than `after` their commit.
    Background {
        /// The time should be long enough for most short-lived layers of builds and of
        /// Docker to be removed before they move.
        after: Duration,
        /// Whether a small layer stays as long as something stands on it. This avoids
        /// copying Docker's small layers, which are removed with their container.
        keeps_small: bool,
    },
    Never,
}

/// Whether snapshots on the writable volume get projects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuotaMode {
    /// If the file system supports them. If it does not, a snapshot that should
    /// be limited is refused.
    Auto,
    /// Always: if projects are not supported, no snapshot is created on the
    /// volume.
    Require,
    Off,
}

/// Which labels pods may use: those of snapshots in the namespace k8s.io.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodLabels {
    /// None of this program's own labels, because they may be annotations of pods.
    Ignored,
    /// All labels, because only administrators set them.
    Trusted,
}

/// How snapshots are limited and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaOptions {
    pub mode: QuotaMode,
    /// The project ids to give out. Each daemon on one file system needs its
    /// own.
    pub ids: ProjectRange,
    /// The limits of each container's snapshot without labels for them.
    pub default: Limits,
    /// How old the result of a walk may be when it is used again.
    pub usage_max_age: Duration,
}

/// The configuration of a [`Snapshotter`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The configured options of every overlay mount, in order.
    pub mount_options: Vec<String>,
    /// Whether Remove deletes the files before it answers. Otherwise, it moves
    /// them to the trash, which Cleanup empties.
    pub removes_at_once: bool,
    pub sync: SyncMode,
    /// Whether the digest of each unpacked layer is recorded after its commit.
    pub records_digests: bool,
    pub relocation: Relocation,
    /// How much has to stay free on the writable volume.
    pub reserve: Reserve,
    /// Whether answers contain [`LABEL_UPPERDIR`].
    pub shows_upperdir: bool,
    pub quota: QuotaOptions,
    /// Which host directories may be shown to containers.
    pub lowers: Policy,
    /// Which host directories the containers of some images are shown, in
    /// order.
    pub lower_rules: Vec<ImageRule>,
    pub pod_labels: PodLabels,
}

impl Options {
    /// These options, adapted to this machine's kernel.
    pub fn for_this_kernel(&self) -> Options {
        let mut options = self.clone();
        // The kernel does not set projects in a user namespace
        // (ioctl_fssetxattr).
        if options.quota.mode == QuotaMode::Auto && mount::probe_user_namespace() {
            options.quota.mode = QuotaMode::Off;
        }
        options
    }

    /// All options of an overlay mount except those that name its directories, as the
    /// kernel needs them now. `spans_file_systems` says whether the directories are
    /// on several file systems.
    pub fn overlay_options(&self, spans_file_systems: bool) -> Vec<String> {
        mount::overlay_options(&mount::Wanted {
            configured: &self.mount_options,
            allows_host_dirs: !self.lowers.allowed.is_empty(),
            spans_file_systems,
        })
    }

    /// The options of a view without host directories: those that it cannot be mounted
    /// without, and those that are configured. It has no upper directory.
    pub fn view_options(&self) -> Vec<String> {
        mount::overlay_options(&mount::Wanted {
            configured: &self.mount_options,
            allows_host_dirs: false,
            spans_file_systems: false,
        })
    }
}
