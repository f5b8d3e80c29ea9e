//! Where readings come from: chips on buses, one file a chip.

pub mod chip;

/// What opens the buses of a gateway.
pub trait Hardware: Send + Sync + 'static {
    /// An I2C bus.
    type I2c: embedded_hal::i2c::I2c + Send + 'static;
    /// A device on an SPI bus, with its chip select.
    type Spi: embedded_hal::spi::SpiDevice + Send + 'static;
    /// How drivers wait for their chips.
    type Delay: embedded_hal::delay::DelayNs + Send + Clone + 'static;
    /// Opens the I2C bus at `path`.
    fn i2c(&self, path: &str) -> anyhow::Result<Self::I2c>;
    /// Opens the SPI device at `path`.
    fn spi(&self, path: &str) -> anyhow::Result<Self::Spi>;
    /// A delay for the drivers of one bus.
    fn delay(&self) -> Self::Delay;
}
