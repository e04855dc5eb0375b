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
    /// The layer is flushed before its Commit is answered.
    AtCommit,
    /// Nothing is flushed: the layer is durable once the kernel has written it.
    Never,
}

/// What happens to layers that were committed on the writable volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relocation {
    /// A thread moves the layers to the image volume, each no earlier than `after` its
    /// commit.
    Background {
        /// How long a layer waits after its commit: long enough that most short-lived
        /// layers of builds and of Docker are removed before they move.
        after: Duration,
        /// Whether a small layer stays as long as something stands on it. Docker's small
        /// layers are then not copied, because they are removed with their container.
        keeps_small: bool,
    },
    Never,
}

/// Whether snapshots on the writable volume get projects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuotaMode {
    /// Snapshots get projects if the file system supports them. If it does not, only a
    /// snapshot that should be limited is refused.
    Auto,
    /// Every snapshot gets a project: if projects are not supported, no snapshot is created
    /// on the volume.
    Require,
    Off,
}

/// Which labels count on the snapshots of pods, which are in the namespace k8s.io.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodLabels {
    /// None of this program's own labels count, because they may be annotations of pods.
    Ignored,
    /// All labels count, because only administrators set them.
    Trusted,
}

/// How snapshots are limited and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaOptions {
    pub mode: QuotaMode,
    /// The project ids to give out. Each daemon on one file system needs a range of its
    /// own.
    pub ids: ProjectRange,
    /// The limits of a container whose labels set none.
    pub default: Limits,
    /// How old a count of a snapshot's files may be to answer another request.
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
    /// Whether the information about a snapshot contains the label [`LABEL_UPPERDIR`].
    pub shows_upperdir: bool,
    pub quota: QuotaOptions,
    /// Which host directories may be shown to containers.
    pub lowers: Policy,
    /// The rules that show host directories to the containers of some images, in order.
    pub lower_rules: Vec<ImageRule>,
    pub pod_labels: PodLabels,
}

impl Options {
    /// Adapts these options to the kernel of this machine.
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

    /// The mount options of a view without host directories: those that are configured, and
    /// those without which the view cannot be mounted. A view has no upper directory, and
    /// so needs fewer options than other overlays.
    pub fn view_options(&self) -> Vec<String> {
        mount::overlay_options(&mount::Wanted {
            configured: &self.mount_options,
            allows_host_dirs: false,
            spans_file_systems: false,
        })
    }
}
