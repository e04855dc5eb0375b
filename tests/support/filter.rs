//! Filters of system calls, as service managers and container engines set them.

#![allow(unsafe_code)]

use std::io::Error;
use std::mem::offset_of;
use std::thread;

/// Runs `work` in a thread that cannot use quotas, and neither can processes
/// that it starts: the kernel answers EPERM (seccomp(2)).
pub fn without_quotas<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let filtered = scope.spawn(|| {
            forbid(&[libc::SYS_quotactl, libc::SYS_quotactl_fd]);
            work()
        });
        filtered.join().unwrap()
    })
}

/// Forbids these calls for the calling thread, for good.
fn forbid(calls: &[libc::c_long]) {
    let step = |code: u32, value: u32, if_equal: u8| libc::sock_filter {
        code: code.try_into().unwrap(),
        jt: if_equal,
        jf: 0,
        k: value,
    };
    let number_at = offset_of!(libc::seccomp_data, nr).try_into().unwrap();
    let mut program = vec![step(
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        number_at,
        0,
    )];
    for (done, call) in calls.iter().enumerate() {
        // The jump over the other calls and the permission, to the refusal.
        let over = u8::try_from(calls.len() - done).unwrap();
        let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        program.push(step(equal, (*call).try_into().unwrap(), over));
    }
    let answer = libc::BPF_RET | libc::BPF_K;
    let refusal = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPERM).unwrap();
    program.push(step(answer, libc::SECCOMP_RET_ALLOW, 0));
    program.push(step(answer, refusal, 0));
    let program = libc::sock_fprog {
        len: program.len().try_into().unwrap(),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the first call takes numbers only, and the second one reads the
    // program, which lives until the end of this function.
    let results = unsafe {
        [
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ),
        ]
    };
    assert_eq!(results, [0, 0], "{}", Error::last_os_error());
}
