//! Undoing the changes that a refused request has made on a disk.

use crate::error::Result;

/// Runs a closure when dropped, unless [`Undo::keep`] was called. Create it before
/// the step that it undoes, or right after it.
#[must_use = "dropping it takes the step back"]
pub struct Undo<F: FnOnce() -> Result<()>> {
    what: &'static str,
    undo: Option<F>,
}

impl<F: FnOnce() -> Result<()>> Undo<F> {
    /// `what` names the step in the log line that is written if the closure fails,
    /// for example "the link to a layer whose commit has failed".
    pub fn new(what: &'static str, undo: F) -> Undo<F> {
        Undo {
            what,
            undo: Some(undo),
        }
    }

    /// Keeps the change, because the request has succeeded: the closure will not run.
    pub fn keep(mut self) {
        self.undo = None;
    }
}

impl<F: FnOnce() -> Result<()>> Drop for Undo<F> {
    fn drop(&mut self) {
        if let Some(undo) = self.undo.take()
            && let Err(error) = undo()
        {
            // The next start removes what is left.
            log::warn!(
                "cannot undo {}; the next start removes its remains: {}",
                self.what,
                error.chain()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn only_what_was_not_kept_is_undone() {
        let undone = Cell::new(0);
        let undo = || {
            undone.set(undone.get() + 1);
            Ok(())
        };
        Undo::new("a test", undo).keep();
        assert_eq!(undone.get(), 0);
        drop(Undo::new("a test", undo));
        assert_eq!(undone.get(), 1);
    }
}
