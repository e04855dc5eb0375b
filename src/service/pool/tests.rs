use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use super::*;

/// Work whose caller waits for ever.
fn wanted(work: Work) -> (Work, GivenUp) {
    (work, Box::new(|| false))
}

#[test]
fn a_stop_waits_for_what_is_under_way_and_admits_no_more() {
    let pool = Pool::start(3).unwrap();
    let done = Arc::new(AtomicUsize::new(0));
    for _ in 0..20 {
        let done = Arc::clone(&done);
        pool.submit(pool.admit().unwrap(), wanted(Work::Brief), move |_| {
            thread::sleep(Duration::from_millis(5));
            done.fetch_add(1, Ordering::SeqCst);
        });
    }
    assert!(pool.close(Duration::from_secs(60)));
    assert_eq!(done.load(Ordering::SeqCst), 20);
    let refused = pool.admit().err().unwrap();
    assert_eq!(refused.code(), RpcStatusCode::UNAVAILABLE);
}

#[test]
fn long_work_leaves_a_worker_to_the_others() {
    let pool = Pool::start(3).unwrap();
    let (began, beginnings) = channel();
    let (release, wait) = channel::<()>();
    let wait = Arc::new(Mutex::new(wait));
    for number in 0..4 {
        let (began, wait) = (began.clone(), Arc::clone(&wait));
        pool.submit(pool.admit().unwrap(), wanted(Work::Long), move |_| {
            began.send(number).unwrap();
            let _ = lock(&wait).recv();
        });
    }
    let next = || beginnings.recv_timeout(Duration::from_secs(60)).unwrap();
    let mut first = [next(), next()];
    first.sort_unstable();
    assert_eq!(first, [0, 1]);
    let began_brief = began.clone();
    pool.submit(pool.admit().unwrap(), wanted(Work::Brief), move |_| {
        began_brief.send(9).unwrap();
    });
    // The brief request begins before the long requests that came first.
    assert_eq!(next(), 9);
    release.send(()).unwrap();
    assert_eq!(next(), 2);
    drop(release);
    assert_eq!(next(), 3);
    assert!(pool.close(Duration::from_secs(60)));
}

#[test]
fn a_request_does_not_wait_for_those_that_hang() {
    let pool = Pool::start(2).unwrap();
    let (release, wait) = channel::<()>();
    let wait = Arc::new(Mutex::new(wait));
    for _ in 0..40 {
        let wait = Arc::clone(&wait);
        pool.submit(pool.admit().unwrap(), wanted(Work::Brief), move |_| {
            let _ = lock(&wait).recv();
        });
    }
    let (began, beginnings) = channel();
    pool.submit(pool.admit().unwrap(), wanted(Work::Brief), move |_| {
        began.send(()).unwrap();
    });
    beginnings.recv_timeout(Duration::from_secs(60)).unwrap();
    drop(release);
    assert!(pool.close(Duration::from_secs(60)));
}

#[test]
fn long_work_is_done_by_an_only_worker_too() {
    let pool = Pool::start(1).unwrap();
    let done = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&done);
    pool.submit(pool.admit().unwrap(), wanted(Work::Long), move |_| {
        counting.fetch_add(1, Ordering::SeqCst);
    });
    assert!(pool.close(Duration::from_secs(60)));
    assert_eq!(done.load(Ordering::SeqCst), 1);
}

#[test]
fn a_stop_does_not_wait_for_ever() {
    let pool = Pool::start(1).unwrap();
    let (release, wait) = channel::<()>();
    pool.submit(pool.admit().unwrap(), wanted(Work::Brief), move |_| {
        let _ = wait.recv();
    });
    assert!(!pool.close(Duration::from_millis(20)));
    drop(release);
    assert!(pool.close(Duration::from_secs(60)));
}

#[test]
fn what_waits_elsewhere_keeps_no_worker_and_is_refused_beyond_a_bound() {
    let pool = Pool::start(1).unwrap();
    let (began, beginnings) = channel();
    let (release, wait) = channel::<()>();
    let wait = Arc::new(Mutex::new(wait));
    for _ in 0..MOST_ELSEWHERE + 1 {
        let (began, wait) = (began.clone(), Arc::clone(&wait));
        pool.submit(
            pool.admit().unwrap(),
            wanted(Work::Elsewhere),
            move |turn| {
                began.send(turn.map_err(|error| error.kind())).unwrap();
                let _ = lock(&wait).recv();
            },
        );
    }
    let next = || beginnings.recv_timeout(Duration::from_secs(60)).unwrap();
    for _ in 0..MOST_ELSEWHERE {
        assert_eq!(next(), Ok(()));
    }
    let brief = began.clone();
    pool.submit(pool.admit().unwrap(), wanted(Work::Brief), move |_| {
        brief.send(Ok(())).unwrap();
    });
    assert_eq!(next(), Ok(()));
    assert_eq!(next(), Err(ErrorKind::Unavailable));
    drop(release);
    let after = began.clone();
    pool.submit(
        pool.admit().unwrap(),
        wanted(Work::Elsewhere),
        move |turn| {
            after.send(turn.map_err(|error| error.kind())).unwrap();
        },
    );
    assert_eq!(next(), Ok(()));
    assert!(pool.close(Duration::from_secs(60)));
}

#[test]
fn what_was_given_up_before_its_turn_is_not_run() {
    let pool = Pool::start(1).unwrap();
    let (release, wait) = channel::<()>();
    let (ended, ends) = channel();
    let long = ended.clone();
    pool.submit(pool.admit().unwrap(), wanted(Work::Long), move |turn| {
        long.send(turn.map_err(|error| error.kind())).unwrap();
        let _ = wait.recv();
    });
    let next = || ends.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(next(), Ok(()));
    // The only worker for long work is busy, so the pool ends a request that was given up.
    let work = (Work::Long, Box::new(|| true) as GivenUp);
    let given_up = ended.clone();
    pool.submit(pool.admit().unwrap(), work, move |turn| {
        given_up.send(turn.map_err(|error| error.kind())).unwrap();
    });
    assert_eq!(next(), Err(ErrorKind::Cancelled));
    drop(release);
    assert!(pool.close(Duration::from_secs(60)));
}
