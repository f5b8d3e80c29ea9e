//! The local disk as an object store.
//!
//! `object_store`'s local files are renamed into place without an fsync, so a message could be acknowledged
//! and then lost in a power cut, or a commit appear empty after one. [`Durable`] stages every object beside
//! its place, fsyncs it, links or renames it into place, and fsyncs the folder; it also fsyncs the folders
//! that it had to make. Once a `put` or `rename` returns, the object survives a power cut; before that, it is
//! there whole or not at all. Delta's log and data files go through the same store.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write},
    path::{Path as FilePath, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use async_trait::async_trait;
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{
    CopyMode, CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, RenameTargetMode, Result,
    UploadPart, local::LocalFileSystem, path::Path,
};
use uuid::Uuid;

/// The local file system, durable when a call returns.
#[derive(Debug)]
pub(super) struct Durable {
    files: LocalFileSystem,
    /// In the names of what is staged, so that they are no other process's: in containers each has the id 1.
    random: u64,
    staged: AtomicU64,
}

impl Default for Durable {
    fn default() -> Self {
        let random = Uuid::now_v7().as_u64_pair().1;
        Durable { files: LocalFileSystem::new(), random, staged: AtomicU64::new(0) }
    }
}

impl fmt::Display for Durable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Durable({})", self.files)
    }
}

impl Durable {
    /// A name beside `target` that listings leave out (`…#number`) and no other process stages to.
    fn staging(&self, target: &FilePath) -> PathBuf {
        let n = self.staged.fetch_add(1, Ordering::Relaxed);
        let mut name = target.as_os_str().to_owned();
        name.push(format!("#{}{n:08}", self.random));
        PathBuf::from(name)
    }
}

#[async_trait]
impl ObjectStore for Durable {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let create = match opts.mode {
            PutMode::Create => true,
            PutMode::Overwrite => false,
            // Refused there, with its own words.
            PutMode::Update(_) => return self.files.put_opts(location, payload, opts).await,
        };
        let target = self.files.path_to_filesystem(location)?;
        let staging = self.staging(&target);
        blocking(move || {
            let written = put(&payload, &staging, &target, create);
            if written.is_err() {
                let _ = fs::remove_file(&staging);
            }
            written.map_err(|e| error(e, &target))
        })
        .await?;
        Ok(PutResult { e_tag: None, version: None })
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let target = self.files.path_to_filesystem(location)?;
        let folder = parent(&target).to_owned();
        blocking(move || create_folders(&folder).map_err(|e| error(e, &folder))).await?;
        let upload = self.files.put_multipart_opts(location, opts).await?;
        Ok(Box::new(DurableUpload { upload, target }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.files.get_opts(location, options).await
    }

    async fn get_ranges(
        &self,
        location: &Path,
        ranges: &[std::ops::Range<u64>],
    ) -> Result<Vec<bytes::Bytes>> {
        self.files.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.files.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.files.list(prefix)
    }

    /// Objects before the offset cost their name only: a table's log has an entry for each commit of a day, and is asked
    /// for what follows the last one at each of them.
    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        let Some(prefix) = prefix.cloned() else { return self.files.list_with_offset(prefix, offset) };
        let offset = offset.clone();
        let folder = self.files.path_to_filesystem(&prefix);
        let found = blocking(move || {
            let (folder, mut found) = (folder?, Vec::new());
            after(&folder, prefix.as_ref(), &offset, &mut found).map_err(|e| error(e, &folder))?;
            Ok(found)
        });
        futures::stream::once(found)
            .map_ok(|found| futures::stream::iter(found).map(Ok))
            .try_flatten()
            .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.files.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let create = matches!(options.mode, CopyMode::Create);
        let from = self.files.path_to_filesystem(from)?;
        let target = self.files.path_to_filesystem(to)?;
        let staging = self.staging(&target);
        blocking(move || {
            let copied = create_folders(parent(&target)).and_then(|()| {
                fs::copy(&from, &staging)?;
                File::open(&staging)?.sync_all()?;
                settle(&staging, &target, create)
            });
            if copied.is_err() {
                let _ = fs::remove_file(&staging);
            }
            copied.map_err(|e| error(e, &target))
        })
        .await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        let create = matches!(options.target_mode, RenameTargetMode::Create);
        let from = self.files.path_to_filesystem(from)?;
        let target = self.files.path_to_filesystem(to)?;
        blocking(move || {
            create_folders(parent(&target))
                .and_then(|()| File::open(&from)?.sync_all())
                .and_then(|()| settle(&from, &target, create))
                .and_then(|()| sync_folder(parent(&from)))
                .map_err(|e| error(e, &target))
        })
        .await
    }
}

/// A multipart upload that is fsynced when it completes. Nothing refers to such an object before that.
#[derive(Debug)]
struct DurableUpload {
    upload: Box<dyn MultipartUpload>,
    target: PathBuf,
}

#[async_trait]
impl MultipartUpload for DurableUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.upload.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let result = self.upload.complete().await?;
        let target = self.target.clone();
        blocking(move || {
            File::open(&target)
                .and_then(|file| file.sync_all())
                .and_then(|()| sync_folder(parent(&target)))
                .map_err(|e| error(e, &target))
        })
        .await?;
        Ok(result)
    }

    async fn abort(&mut self) -> Result<()> {
        self.upload.abort().await
    }
}

/// Whether a file is on its way to its place, ours or `object_store`'s own.
fn is_staged(name: &str) -> bool {
    name.rsplit_once('#').is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Removes what writers have left on its way that were killed: all that was last written before `before`. No listing
/// shows it. Returns how many files.
pub(super) fn sweep(folder: &FilePath, before: SystemTime) -> io::Result<usize> {
    let mut swept = 0;
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let (place, name) = (entry.path(), entry.file_name());
        let done = if entry.file_type()?.is_dir() {
            sweep(&place, before)
        } else if name.to_str().is_some_and(is_staged) {
            let remove = |about: fs::Metadata| match about.modified()? < before {
                true => fs::remove_file(&place).map(|()| 1),
                false => Ok(0),
            };
            entry.metadata().and_then(remove)
        } else {
            Ok(0)
        };
        match done {
            // It has gone since.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            done => swept += done?,
        }
    }
    Ok(swept)
}

/// Finds the objects in a folder, whose path in the store is `at`, and in those below it, that come after `offset`.
fn after(folder: &FilePath, at: &str, offset: &Path, found: &mut Vec<ObjectMeta>) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_str().ok_or_else(|| io::Error::other(format!("{name:?} is not UTF-8")))?;
        if is_staged(name) {
            continue;
        }
        let path = format!("{at}/{name}");
        let behind = path.as_str() <= offset.as_ref();
        if behind && !offset.as_ref().starts_with(&path) {
            continue;
        }
        let place = entry.path();
        let metadata = match fs::metadata(&place) {
            // It has gone since.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            metadata => metadata?,
        };
        if metadata.is_dir() {
            after(&place, &path, offset, found)?;
        } else if !behind {
            found.push(ObjectMeta {
                location: Path::parse(&path).map_err(io::Error::other)?,
                last_modified: metadata.modified()?.into(),
                size: metadata.len(),
                e_tag: None,
                version: None,
            });
        }
    }
    Ok(())
}

fn put(payload: &PutPayload, staging: &FilePath, target: &FilePath, create: bool) -> io::Result<()> {
    create_folders(parent(target))?;
    let mut file = File::create_new(staging)?;
    for bytes in payload {
        file.write_all(bytes)?;
    }
    file.sync_all()?;
    settle(staging, target, create)
}

/// Moves `staging` to `target`, refusing to replace it when `create`, and makes the move durable.
fn settle(staging: &FilePath, target: &FilePath, create: bool) -> io::Result<()> {
    if create {
        match fs::hard_link(staging, target) {
            // Who linked it may have failed right after that: nobody must take for durable what is not.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                sync_folder(parent(target))?;
                return Err(e);
            }
            linked => linked?,
        }
        fs::remove_file(staging)?;
    } else {
        fs::rename(staging, target)?;
    }
    sync_folder(parent(target))
}

/// Makes the missing folders of a path, and each of them durable in its parent.
pub(super) fn create_folders(folder: &FilePath) -> io::Result<()> {
    if folder.as_os_str().is_empty() || folder.is_dir() {
        return Ok(());
    }
    let above = parent(folder);
    create_folders(above)?;
    match fs::create_dir(folder) {
        Ok(()) => sync_folder(above),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
    }
}

fn sync_folder(folder: &FilePath) -> io::Result<()> {
    let folder = if folder.as_os_str().is_empty() { FilePath::new(".") } else { folder };
    File::open(folder)?.sync_all()
}

fn parent(path: &FilePath) -> &FilePath {
    path.parent().unwrap_or(FilePath::new("/"))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(object_store::Error::JoinError { source: e }),
    }
}

fn error(source: io::Error, path: &FilePath) -> object_store::Error {
    let path = path.display().to_string();
    match source.kind() {
        io::ErrorKind::AlreadyExists => object_store::Error::AlreadyExists { path, source: source.into() },
        io::ErrorKind::NotFound => object_store::Error::NotFound { path, source: source.into() },
        _ => object_store::Error::Generic { store: "local disk", source: format!("{path}: {source}").into() },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use std::time::Duration;

    use super::*;

    /// A file with its own name in it.
    fn written(folder: &FilePath, name: &str) -> PathBuf {
        let place = folder.join(name);
        create_folders(parent(&place)).unwrap();
        fs::write(&place, name).unwrap();
        place
    }

    #[tokio::test]
    async fn what_killed_writers_left_is_swept_once_it_is_old() {
        let folder = tempfile::tempdir().unwrap();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let names = [
            "t/a.parquet#17",
            "t/b.parquet#18",
            "t/_delta_log/1.json#19",
            "t/c.parquet",
            "t/d#old",
            "t/e#",
            "f#20",
        ];
        for name in names {
            let place = written(folder.path(), name);
            let age = if name.ends_with("18") { 60 } else { 7200 };
            let file = File::options().write(true).open(place).unwrap();
            file.set_modified(now - Duration::from_secs(age)).unwrap();
        }
        let before = now - Duration::from_secs(3600);
        assert_eq!(sweep(&folder.path().join("t"), before).unwrap(), 2);
        let left: Vec<&str> = names.into_iter().filter(|name| folder.path().join(name).exists()).collect();
        assert_eq!(left, ["t/b.parquet#18", "t/c.parquet", "t/d#old", "t/e#", "f#20"]);
        assert_eq!(sweep(&folder.path().join("none"), before).unwrap(), 0);

        // What is staged by us is among it.
        let disk = Durable::default();
        let mine = disk.staging(&folder.path().join("t/mine"));
        assert!(is_staged(mine.file_name().unwrap().to_str().unwrap()));
        assert_ne!(Durable::default().staging(&folder.path().join("t/mine")), mine);
    }

    #[tokio::test]
    async fn what_follows_an_offset_is_what_object_store_says() {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::from_absolute_path(folder.path()).unwrap();
        let names = [
            "log/00000000000000000001.json",
            "log/00000000000000000002.json",
            "log/00000000000000000002.checkpoint.parquet",
            "log/_sidecars/a.parquet",
            "log/00000000000000000003.json#42",
            "log/00000000000000000003",
            "log/a b%20c.json",
            "log/a/b",
            "log/a/c/d",
            "log/a-b",
            "log/ab/c",
            "logs/1",
        ];
        for name in names {
            written(folder.path(), name);
        }
        let (ours, theirs) = (Durable::default(), LocalFileSystem::new());
        let at = |name: &str| Path::parse(format!("{root}/{name}")).unwrap();
        let offsets = names.iter().chain(&["log", "log/", "log/0", "log/a/", "log/a/c", "log/z"]);
        for offset in offsets.map(|name| at(name.trim_end_matches('/'))) {
            for prefix in ["log", "log/a", "none"].map(at) {
                let mut found = Vec::new();
                for listed in [
                    ours.list_with_offset(Some(&prefix), &offset),
                    theirs.list_with_offset(Some(&prefix), &offset),
                ] {
                    let listed: Vec<ObjectMeta> = listed.try_collect().await.unwrap();
                    let same = listed.into_iter().map(|o| (o.location, o.size, o.last_modified));
                    found.push(same.collect::<BTreeSet<_>>());
                }
                assert_eq!(found[0], found[1], "{prefix} after {offset}");
            }
        }
    }
}
