//! How the allocator keeps memory, where the C library is glibc; other allocators are left alone.

/// For a gateway: as little as it can, by asking the kernel early.
///
/// By default glibc gives every thread an arena, up to eight for each core: what many threads take turns at is then held
/// many times over. It also raises the size from which on it asks the kernel for a block of its own to that of the
/// largest one that was given back, up to 32 MiB.
///
/// The outbox opens a database every few megabytes, each with two page tables of 2 and 4 MiB that are mostly never
/// touched: from the second one on they come out of an arena, zeroed by hand and so in memory, and leave holes there.
/// After 20 million readings that was 60 MiB instead of 20.
pub fn frugal() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        // As many arenas as a small gateway has threads that work.
        (libc::M_ARENA_MAX, 2),
        // Of 256 KiB and more: the tables and write buffers of databases, and the larger ones of zstd.
        (libc::M_MMAP_THRESHOLD, 256 * 1024),
        (libc::M_TRIM_THRESHOLD, 1024 * 1024),
    ] {
        #[expect(unsafe_code, reason = "there is no safe wrapper of mallopt")]
        // SAFETY: mallopt takes plain numbers, and locks the allocator itself. What it does not know it ignores.
        unsafe {
            libc::mallopt(parameter, value)
        };
    }
}
