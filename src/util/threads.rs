//! Background threads that end together with the value that owns them.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crate::error::{Error, ErrorKind, Result};

/// A running thread. Dropping this value stops the thread and waits for its
/// end.
pub struct Background {
    name: &'static str,
    stop: Box<dyn Fn() + Send>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Starts a thread of that name, which runs `work` on `part` until `stop` is called.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] if the system cannot start a thread.
    pub fn start<T: Send + Sync + 'static>(
        name: &'static str,
        part: &Arc<T>,
        stop: impl Fn(&T) + Send + 'static,
        work: impl FnOnce(&T) + Send + 'static,
    ) -> Result<Background> {
        let (stopped, working) = (Arc::clone(part), Arc::clone(part));
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&working))
            .map_err(|error| {
                Error::caused(ErrorKind::Internal, format!("start the {name}"), error)
            })?;
        Ok(Background {
            name,
            stop: Box::new(move || stop(&stopped)),
            thread: Some(thread),
        })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        (self.stop)();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!(
                "the {} has ended because of a bug; the log shows where",
                self.name
            );
        }
    }
}
