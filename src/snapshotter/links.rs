//! Links on the image volume to layers whose bytes are on the writable volume.
//!
//! Owns: a thread that creates and removes these links, so that a layer can be committed
//! and removed while the image disk sleeps or does not answer. A request that mounts a
//! layer waits for its link. After a crash, links may be missing or left over: the next
//! start creates or removes them.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::trash::Trash;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::Ancestor;
use crate::types::{SnapshotId, Volume};
use crate::util::monitor::Monitor;
use crate::util::threads::Background;
use crate::volume::Volumes;
use crate::waits::{self, Awaited};

/// How long a Commit or a Remove waits for a change of its link. A disk that takes longer
/// is asleep, or hangs.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long a request that mounts a layer waits for its link: disks take seconds to spin up.
const LONGEST: Duration = Duration::from_secs(30);

pub(super) struct Links {
    volumes: Arc<Volumes>,
    trash: Arc<Trash>,
    work: Monitor<Work>,
}

#[derive(Default)]
struct Work {
    jobs: VecDeque<Job>,
    /// The job that the thread is working on.
    current: Option<Job>,
    /// Layers whose link is not known to exist, and the reason if it could not be
    /// created.
    unlinked: HashMap<SnapshotId, Option<Error>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Job {
    Make(SnapshotId),
    /// Remove the link of a layer that was not committed.
    TakeBack(SnapshotId),
    /// Remove the link of a layer that was removed, or the copy that a move was
    /// about to record.
    Remove(SnapshotId),
}

impl Work {
    /// The error with which the link of a layer could not be created. All requests that
    /// wait for the link get the same error.
    fn failure(&self, id: SnapshotId) -> Option<Error> {
        let why = self.unlinked.get(&id)?.as_ref()?;
        Some(Error::new(why.kind(), why.chain()))
    }

    fn is_open(&self, job: Job) -> bool {
        self.current == Some(job) || self.jobs.contains(&job)
    }
}

impl Links {
    pub(super) fn new(volumes: Arc<Volumes>, trash: Arc<Trash>) -> Links {
        Links {
            volumes,
            trash,
            work: Monitor::default(),
        }
    }

    pub(super) fn start(self: &Arc<Links>) -> Result<Background> {
        let stop = |links: &Links| links.work.stop();
        Background::start("links", self, stop, Links::run)
    }

    /// Asks the thread to create the link of a new layer, and waits for [`PATIENCE`].
    ///
    /// # Errors
    ///
    /// The reason why the link could not be created, if that is known within this time.
    pub(super) fn make(&self, id: SnapshotId) -> Result<()> {
        self.work.change(|work| {
            work.unlinked.insert(id, None);
            work.jobs.push_back(Job::Make(id));
        });
        self.wait_for(Job::Make(id));
        self.work.look(|work| work.failure(id)).map_or(Ok(()), Err)
    }

    fn wait_for(&self, job: Job) {
        let deadline = Some(Instant::now() + PATIENCE);
        self.work
            .wait_until(deadline, |work| work.is_open(job), |_| ());
    }

    /// Asks the thread to remove the link of a layer whose commit has failed, and waits for
    /// [`PATIENCE`].
    pub(super) fn take_back(&self, id: SnapshotId) {
        self.add(Job::TakeBack(id), id);
    }

    /// Asks the thread to remove the link of a removed layer, and waits for [`PATIENCE`].
    pub(super) fn remove(&self, id: SnapshotId) {
        self.add(Job::Remove(id), id);
    }

    fn add(&self, job: Job, id: SnapshotId) {
        self.work.change(|work| {
            work.unlinked.remove(&id);
            work.jobs.push_back(job);
        });
        self.wait_for(job);
    }

    /// Whether the links of these layers exist. Does not wait.
    pub(super) fn are_made(&self, layers: &[Ancestor]) -> bool {
        self.work.look(|work| {
            layers
                .iter()
                .all(|layer| !work.unlinked.contains_key(&layer.id))
        })
    }

    /// Waits until the links of these layers exist. A link that could not be created before
    /// is tried again.
    ///
    /// # Errors
    ///
    /// The reason why a link cannot be created; [`ErrorKind::Unavailable`] if the image
    /// disk does not answer.
    pub(super) fn require(&self, layers: impl IntoIterator<Item = SnapshotId>) -> Result<()> {
        for id in layers {
            let job = Job::Make(id);
            let is_unlinked = self.work.change(|work| {
                let is_unlinked = work.unlinked.contains_key(&id);
                if is_unlinked && !work.is_open(job) {
                    work.jobs.push_back(job);
                }
                is_unlinked
            });
            if !is_unlinked {
                continue;
            }
            waits::enter(Awaited::Volume(Volume::Image))?;
            let deadline = Some(Instant::now() + LONGEST);
            let is_open = |work: &Work| work.is_open(job);
            let look = |work: &mut Work| (work.is_open(job), work.failure(id));
            match self.work.wait_until(deadline, is_open, look) {
                Some((true, _)) => return Err(not_answered(id)),
                Some((false, Some(error))) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Notes that the start could not create the link of this layer.
    pub(super) fn note_unlinked(&self, id: SnapshotId) {
        self.work.look(|work| work.unlinked.insert(id, None));
    }

    fn run(&self) {
        let is_idle = |work: &Work| work.jobs.is_empty();
        let take = |work: &mut Work| {
            work.current = work.jobs.pop_front();
            work.current
        };
        while let Some(job) = self.work.wait_while(is_idle, take) {
            match job {
                // A link that two requests have asked for is created once. At the second
                // job, the layer may have moved.
                Some(Job::Make(id)) if !self.work.look(|work| work.unlinked.contains_key(&id)) => {}
                Some(Job::Make(id)) => {
                    let made = self.volumes.link_home(id);
                    self.work.look(|work| match made {
                        Ok(()) => drop(work.unlinked.remove(&id)),
                        Err(error) => {
                            work.unlinked.entry(id).and_modify(|why| *why = Some(error));
                        }
                    });
                }
                Some(Job::TakeBack(id)) => log_failure(self.volumes.image().remove_link(id)),
                Some(Job::Remove(id)) => log_failure(self.drop_link(id)),
                None => {}
            }
            self.work.change(|work| work.current = None);
        }
    }

    /// Removes the entry of a removed layer on the image volume: its link, or the copy that
    /// a move was about to record.
    fn drop_link(&self, id: SnapshotId) -> Result<()> {
        let image = self.volumes.image();
        let removed = image.remove_link(id).and_then(|()| image.dirs().trash(id));
        match removed {
            Ok(_) => {
                self.trash.note_trashed(id, Volume::Image);
                Ok(())
            }
            Err(error) => {
                self.trash.note_stray(Volume::Image);
                Err(error)
                    .context(|| format!("remove the entries of layer {id} on the image volume"))
            }
        }
    }
}

fn not_answered(id: SnapshotId) -> Error {
    Error::new(
        ErrorKind::Unavailable,
        format!(
            "layer {id} cannot be used yet, because a link to its files could not be created on \
             the image volume within {} seconds: check whether the image disk answers, and try \
             again",
            LONGEST.as_secs()
        ),
    )
}

fn log_failure(done: Result<()>) {
    if let Err(error) = done {
        log::warn!(
            "the entry of a layer that was removed, or whose commit has failed, stays in \
             snapshots/ of the image volume until the next start: {}",
            error.chain()
        );
    }
}
