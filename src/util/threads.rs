//! A thread that works beside the requests and ends with the value that stands
//! for it.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crate::error::{Error, ErrorKind, Result};

/// A running thread. Dropping it has the thread end, and waits for that.
pub struct Background {
    name: &'static str,
    stop: Box<dyn Fn() + Send>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Starts a thread of that name, which does `work` on `part` until `stop` is called.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] if the system gives no thread.
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
            log::error!("the {} has ended by a bug; the log says where", self.name);
        }
    }
}
