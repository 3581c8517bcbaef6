//! Threads that load onto devices, and how far they stand behind those that compute there: the one policy of the system's
//! scheduler that is needed, and that no safe interface here offers.

use std::io;

/// Lets the calling thread run only where nothing else wants to, and give way as soon as something does (`SCHED_IDLE`).
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
pub fn run_when_idle() -> io::Result<()> {
    // By number: musl's own function of this name does nothing and answers ENOSYS.
    // SAFETY: the parameters are plain numbers, of which all zeros are valid and the only ones for this policy; 0 is the
    // calling thread; the pointer is to a value that outlives the call, and the kernel only reads it.
    let result = unsafe {
        let parameters: libc::sched_param = std::mem::zeroed();
        libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_IDLE, &raw const parameters)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
pub fn run_when_idle() -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
