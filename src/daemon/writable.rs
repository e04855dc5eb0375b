//! Taking the writable volume into use: marked at the first start, recognised
//! at later ones, and asked whether containers can write there.

use std::path::Path;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::mount;
use crate::store::Store;
use crate::types::Volume;
use crate::volume::{Claim, Identity, Volumes};

/// Facts in the database: the volume's identity, and whether its mark is known
/// to be on the disk. The first is recorded before the mark is written, so
/// that a crash in between is told from a disk that is not mounted.
const IDENTITY: &str = "writable_volume";
const CLAIMED: &str = "writable_volume_claimed";

/// Makes the writable directory the volume that the database knows. One that
/// is missing at a later start is no error: what does not need it is served.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if at the first start it belongs to
/// another root, or if it cannot hold overlayfs's upper directories.
pub fn set_up(volumes: &Volumes, store: &Store, mount_options: &[String]) -> Result<()> {
    let (identity, is_claimed) = recorded(store)?;
    if !is_claimed {
        claim(volumes, store, &identity, mount_options)?;
        volumes.expect_writable(identity);
        return Ok(());
    }
    volumes.expect_writable(identity);
    match volumes.open(Volume::Writable) {
        Ok(_) => {
            // It could hold one before. A disk that is full or has become
            // read-only must not keep what can be done from being done.
            if let Err(error) = probe(volumes, mount_options) {
                log::warn!("{}", error.chain());
            }
            Ok(())
        }
        // Told by recovery, with what it means.
        Err(error) if error.kind() == ErrorKind::FailedPrecondition => Ok(()),
        Err(error) => Err(error),
    }
}

/// Probed before it is marked: a directory that turns out to be unsuitable is
/// left as it was, and the next start may take another.
fn claim(
    volumes: &Volumes,
    store: &Store,
    identity: &Identity,
    mount_options: &[String],
) -> Result<()> {
    if let Claim::Foreign(other) = volumes.look_at_writable(identity)? {
        return Err(Error::new(
            ErrorKind::FailedPrecondition,
            format!(
                "the writable directory {path} is the volume {other} of another root: give \
                 another --writable-dir, or, if nothing else uses it, empty it and remove \
                 {path}/.volume",
                path = volumes.writable_path()
            ),
        ));
    }
    probe(volumes, mount_options)?;
    volumes.claim_writable(identity)?;
    let mut transaction = store.write()?;
    transaction.rows().record_fact(CLAIMED, "yes")?;
    transaction.commit()
}

fn recorded(store: &Store) -> Result<(Identity, bool)> {
    let mut transaction = store.write()?;
    let is_claimed = transaction.rows().fact(CLAIMED)?.is_some();
    let identity = match transaction.rows().fact(IDENTITY)? {
        Some(text) => Identity::parse(&text).ok_or_else(|| {
            Error::new(
                ErrorKind::DataLoss,
                format!("the database is damaged: the writable volume is {text:?}"),
            )
        })?,
        None => {
            let identity = Identity::random()?;
            transaction
                .rows()
                .record_fact(IDENTITY, &identity.to_string())?;
            identity
        }
    };
    transaction.commit()?;
    Ok((identity, is_claimed))
}

/// In a directory of its own, which the next start removes if a crash left it.
fn probe(volumes: &Volumes, mount_options: &[String]) -> Result<()> {
    let scratch = Path::new(volumes.writable_path()).join(".probe");
    let clear = || {
        mount::unmount_stale(&scratch.join(mount::MERGED));
        match std::fs::remove_dir_all(&scratch) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::caused(
                ErrorKind::Internal,
                format!("remove {}", scratch.display()),
                error,
            )),
            _ => Ok(()),
        }
    };
    clear()?;
    let probed = mount::probe_upper(&scratch, mount_options).context(|| {
        format!(
            "the file system of {} cannot hold what containers write (overlayfs's upper \
             directory): use another one, for example ext4",
            volumes.writable_path()
        )
    });
    probed.and(clear())
}
