//! The network cable between a gateway and the broker: a TCP relay on loopback that can be cut.
//!
//! A cut cable is silent. Bytes stop, nothing is closed, and both ends find out by their own timeouts,
//! as they would in a plant. When it is mended the old connections are gone, as after a long outage.

use std::net::SocketAddr;

use anyhow::Context as _;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// The near end of a cable. Dropping it removes the cable.
pub(super) struct Cable {
    /// Where the gateway connects to.
    pub(super) near: SocketAddr,
    cut: watch::Sender<bool>,
}

impl Cable {
    /// Lays a cable from a free port on loopback to `far`.
    ///
    /// # Errors
    /// When no port can be opened.
    pub(super) async fn lay(far: SocketAddr) -> anyhow::Result<Cable> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("opening a port for the cable")?;
        let near = listener.local_addr()?;
        let (cut, state) = watch::channel(false);
        tokio::spawn(relay(listener, far, state));
        Ok(Cable { near, cut })
    }

    /// Cuts or mends the cable.
    pub(super) fn set_cut(&self, cut: bool) {
        self.cut.send_replace(cut);
    }

    /// Whether it is cut.
    pub(super) fn is_cut(&self) -> bool {
        *self.cut.borrow()
    }
}

async fn relay(listener: TcpListener, far: SocketAddr, mut cut: watch::Receiver<bool>) {
    // While it is cut, nobody accepts: the kernel completes the handshake and nothing follows.
    while cut.wait_for(|is_cut| !is_cut).await.is_ok() {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            changed = cut.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        if let Ok((near, _)) = accepted {
            tokio::spawn(connection(near, far, cut.clone()));
        }
    }
}

async fn connection(mut near: TcpStream, far: SocketAddr, mut cut: watch::Receiver<bool>) {
    let Ok(mut far) = TcpStream::connect(far).await else { return };
    tokio::select! {
        _ = copy_bidirectional(&mut near, &mut far) => return,
        _ = cut.wait_for(|is_cut| *is_cut) => {}
    }
    // Both sockets stay open and silent until the cable is mended (or removed).
    let _ = cut.wait_for(|is_cut| !is_cut).await;
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        time::timeout,
    };

    use super::*;

    #[tokio::test]
    async fn a_cut_is_silent_and_a_mended_cable_carries_again() {
        let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let far = echo.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = echo.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = socket.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
            }
        });
        let cable = Cable::lay(far).await.unwrap();
        let mut socket = TcpStream::connect(cable.near).await.unwrap();
        let mut byte = [0];
        socket.write_all(b"a").await.unwrap();
        socket.read_exact(&mut byte).await.unwrap();
        assert_eq!(&byte, b"a");

        cable.set_cut(true);
        tokio::time::sleep(Duration::from_millis(50)).await;
        socket.write_all(b"b").await.unwrap();
        let silence = timeout(Duration::from_millis(200), socket.read_exact(&mut byte)).await;
        assert!(silence.is_err(), "bytes crossed a cut cable");

        cable.set_cut(false);
        let end = timeout(Duration::from_secs(5), socket.read(&mut byte)).await.unwrap();
        assert!(matches!(end, Ok(0) | Err(_)), "the old connection survived");
        let mut socket = TcpStream::connect(cable.near).await.unwrap();
        socket.write_all(b"c").await.unwrap();
        timeout(Duration::from_secs(5), socket.read_exact(&mut byte)).await.unwrap().unwrap();
        assert_eq!(&byte, b"c");
    }
}
