//! How the allocator keeps memory, where the C library is glibc; other allocators are left alone.
//!
//! By default glibc gives every thread an arena, up to eight for each core: what many threads take turns at is then held
//! many times over. It also raises the size from which on it asks the kernel for a block of its own to that of the
//! largest one that was given back, up to 32 MiB.

/// For a gateway: as little as it can, by asking the kernel early.
///
/// The outbox opens a database every few megabytes, each with two page tables of 2 and 4 MiB that are mostly never
/// touched: from the second one on they come out of an arena, zeroed by hand and so in memory, and leave holes there.
/// After 20 million readings that was 60 MiB instead of 20.
pub fn frugal() {
    set(&[
        // As many arenas as a small gateway has threads that work.
        (ARENA_MAX, 2),
        // Of 256 KiB and more: the tables and write buffers of databases, and the larger ones of zstd.
        (MMAP_THRESHOLD, 256 * 1024),
        (TRIM_THRESHOLD, 1024 * 1024),
    ]);
}

/// For a server: few arenas, which large batches pass through one after the other. What one has left stays for the next,
/// until [`give_back`]; to ask the kernel for it anew, page by page, took a tenth of all CPU time.
pub fn steady() {
    set(&[
        (ARENA_MAX, 2),
        // The most that glibc takes.
        (MMAP_THRESHOLD, 32 * 1024 * 1024),
        (TRIM_THRESHOLD, 256 * 1024 * 1024),
    ]);
}

/// Gives back to the kernel what is free, also between what is not: after work that took a lot for a short time.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "there is no safe wrapper of malloc_trim")]
    // SAFETY: malloc_trim takes a plain number, and locks the allocator itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(target_env = "gnu")]
use libc::{
    M_ARENA_MAX as ARENA_MAX, M_MMAP_THRESHOLD as MMAP_THRESHOLD, M_TRIM_THRESHOLD as TRIM_THRESHOLD,
};

#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "there is no safe wrapper of mallopt")]
fn set(limits: &[(i32, i32)]) {
    for (parameter, value) in limits {
        // SAFETY: mallopt takes plain numbers, and locks the allocator itself. What it does not know it ignores.
        unsafe { libc::mallopt(*parameter, *value) };
    }
}

#[cfg(not(target_env = "gnu"))]
const ARENA_MAX: i32 = 0;
#[cfg(not(target_env = "gnu"))]
const MMAP_THRESHOLD: i32 = 0;
#[cfg(not(target_env = "gnu"))]
const TRIM_THRESHOLD: i32 = 0;

#[cfg(not(target_env = "gnu"))]
fn set(_limits: &[(i32, i32)]) {}
