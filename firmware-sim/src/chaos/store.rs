//! The lake on a server that speaks S3, which is a child and is killed like the others: a SeaweedFS of one process.
//!
//! Its data is `{data-dir}/store`. Its keys are made at each run, and stand in two files beside it that only their
//! owner may read: `cloud-ingest.toml` refers to them, the server gets them in its environment. So whoever judges the
//! lake from outside can start the server again on the same data.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use cloud_ingest::{settings::StoreSettings, store::Store};
use uuid::Uuid;

use crate::{
    demo::{configs::quoted, loopback},
    program::Program,
};

/// Bucket, and prefix of the lake in it.
const URL: &str = "s3://chaos/lake";
/// The files of the keys.
const KEY_ID: &str = "store.key-id";
const SECRET: &str = "store.secret";
/// It listens on so many ports: S3, filer, master and volumes, each by HTTP and by gRPC.
pub(super) const PORTS: usize = 8;
/// A server that starts gets so long.
const START: Duration = Duration::from_secs(120);

/// The server.
pub(super) struct Server {
    pub(super) program: Program,
    endpoint: SocketAddr,
    home: PathBuf,
    ports: [u16; PORTS],
}

impl Server {
    /// SeaweedFS's program `weed`, not yet started, with its data and keys in `home`.
    pub(super) fn new(weed: &Path, home: &Path, log: PathBuf, ports: [u16; PORTS]) -> anyhow::Result<Server> {
        let data = home.join("store");
        fs::create_dir_all(&data).with_context(|| format!("cannot write to {}", data.display()))?;
        let (id, secret) = (Uuid::now_v7().simple().to_string(), Uuid::now_v7().simple().to_string());
        for (name, key) in [(KEY_ID, &id), (SECRET, &secret)] {
            let path = home.join(name);
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            file.and_then(|mut file| file.write_all(key.as_bytes()))
                .with_context(|| format!("writing {}", path.display()))?;
        }
        let [s3, s3_grpc, filer, filer_grpc, master, master_grpc, volume, volume_grpc] = ports;
        let args = [
            "server".to_owned(),
            "-ip=127.0.0.1".to_owned(),
            "-ip.bind=127.0.0.1".to_owned(),
            format!("-dir={}", data.display()),
            "-volume.max=0".to_owned(),
            "-volume.preStopSeconds=0".to_owned(),
            "-master.telemetry=false".to_owned(),
            // Alone, it need not wait 10 s for others before it leads.
            "-master.electionTimeout=1s".to_owned(),
            "-s3".to_owned(),
            "-s3.port.iceberg=0".to_owned(),
            "-s3.port.lance=0".to_owned(),
            "-filer".to_owned(),
            format!("-s3.port={s3}"),
            format!("-s3.port.grpc={s3_grpc}"),
            format!("-filer.port={filer}"),
            format!("-filer.port.grpc={filer_grpc}"),
            format!("-master.port={master}"),
            format!("-master.port.grpc={master_grpc}"),
            format!("-volume.port={volume}"),
            format!("-volume.port.grpc={volume_grpc}"),
        ];
        let args: Vec<&Path> = args.iter().map(Path::new).collect();
        let program = Program::new("weed", weed.to_owned(), &args, log)?
            .with_env([("AWS_ACCESS_KEY_ID", id), ("AWS_SECRET_ACCESS_KEY", secret)]);
        Ok(Server { program, endpoint: loopback(s3), home: home.to_owned(), ports })
    }

    /// `[store]` of `cloud-ingest.toml`, without its head.
    pub(super) fn section(&self) -> anyhow::Result<String> {
        let reference = |name| quoted(&self.home.join(name)).map(|path| path.replacen('"', "\"file:", 1));
        Ok(format!(
            "url = \"{URL}\"\n[store.s3]\nendpoint = \"http://{}\"\naccess_key_id = {}\nsecret_access_key = {}\n",
            self.endpoint,
            reference(KEY_ID)?,
            reference(SECRET)?,
        ))
    }

    /// Starts it, and has it make the bucket.
    pub(super) async fn start(&mut self, settings: &StoreSettings) -> anyhow::Result<()> {
        self.program.start()?;
        self.program.listens(self.endpoint, START).await?;
        // Makes the bucket, and is tried for longer than the server takes for its first volumes.
        Store::configured(settings)?.prove_put_if_absent().await
    }
}

impl Drop for Server {
    /// SIGKILL leaves its sockets behind.
    fn drop(&mut self) {
        for (port, grpc) in self.ports.chunks(2).map(|pair| (pair[0], pair[1])) {
            for name in ["s3", "filer", "master", "volume"] {
                let _ = fs::remove_file(format!("/tmp/seaweedfs-{name}-{port}.sock"));
                let _ = fs::remove_file(format!("/tmp/seaweedfs-{name}-grpc-{grpc}.sock"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::chaos::configs;

    #[test]
    fn the_cloud_finds_the_server_and_its_keys() {
        let folder = tempfile::tempdir().unwrap();
        let ports = std::array::from_fn(|n| 20_001 + n as u16);
        let log = folder.path().join("weed.log");
        let server = Server::new("/bin/weed".as_ref(), folder.path(), log, ports).unwrap();
        let path = folder.path().join("cloud-ingest.toml");
        let text = configs::cloud(&server.section().unwrap(), loopback(1), 3, 4, false, "cloud-1");
        fs::write(&path, &text).unwrap();
        let store = cloud_ingest::settings::Settings::load(Some(&path)).unwrap().store;
        assert_eq!((store.url.as_str(), store.s3.endpoint.as_str()), (URL, "http://127.0.0.1:20001"));
        Store::configured(&store).unwrap();
        for (name, found) in [(KEY_ID, store.s3.access_key_id), (SECRET, store.s3.secret_access_key)] {
            let key = fs::read_to_string(folder.path().join(name)).unwrap();
            assert_eq!(found.resolve().unwrap().as_ref(), Some(&key));
            assert!(!text.contains(&key));
            let mode = fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        // Keys of one run are not given to the next.
        assert!(Server::new("/bin/weed".as_ref(), folder.path(), path, ports).is_err());
    }
}
