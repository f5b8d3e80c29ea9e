//! The five columns that say of which device a row is: one table look-up a row instead of hashing text.

use std::sync::Arc;

use arrow::{
    array::{ArrayRef, DictionaryArray, Int32Array, StringArray},
    datatypes::Int32Type,
};
use common::reading::{Device, DeviceIx, Registry};

/// device_id, device_type, asset_id, unit, kind.
pub(super) struct DeviceColumns([Column; 5]);

struct Column {
    /// The different words.
    words: Vec<String>,
    /// Which of them a device has, by its index.
    of_device: Vec<u32>,
    /// The key of each word in the batch that is being made; -1 while it does not occur.
    key: Vec<i32>,
}

impl DeviceColumns {
    pub(super) fn new(registry: &Registry) -> Self {
        let of: [fn(&Device) -> &str; 5] = [
            |device| &device.id,
            |device| &device.device_type,
            |device| &device.asset,
            |device| &device.unit,
            |device| device.kind.as_str(),
        ];
        Self(of.map(|of| Column::new(registry.devices.iter().map(of))))
    }

    /// The columns of rows of these devices; their dictionaries hold only words that occur.
    pub(super) fn of(&mut self, devices: impl ExactSizeIterator<Item = DeviceIx> + Clone) -> [ArrayRef; 5] {
        self.0.each_mut().map(|column| column.of(devices.clone()))
    }

    /// Bytes of all words together.
    pub(super) fn text_bytes(&self) -> usize {
        self.0.iter().flat_map(|column| &column.words).map(|word| word.len() + 4).sum()
    }
}

impl Column {
    fn new<'a>(of_devices: impl Iterator<Item = &'a str>) -> Self {
        let mut words: Vec<String> = Vec::new();
        let of_device = of_devices.map(|word| {
            let found = words.iter().position(|known| known == word);
            found.unwrap_or_else(|| {
                words.push(word.to_owned());
                words.len() - 1
            }) as u32
        });
        let of_device = of_device.collect();
        Self { key: vec![-1; words.len()], of_device, words }
    }

    fn of(&mut self, devices: impl ExactSizeIterator<Item = DeviceIx>) -> ArrayRef {
        let mut keys = Vec::with_capacity(devices.len());
        let mut used: Vec<usize> = Vec::new();
        for device in devices {
            let word = self.of_device[device.index()] as usize;
            if self.key[word] < 0 {
                self.key[word] = used.len() as i32;
                used.push(word);
            }
            keys.push(self.key[word]);
        }
        let words = StringArray::from_iter_values(used.iter().map(|word| &self.words[*word]));
        used.iter().for_each(|word| self.key[*word] = -1);
        Arc::new(
            DictionaryArray::<Int32Type>::try_new(Int32Array::from(keys), Arc::new(words))
                .expect("every key was handed out for a word of the batch"),
        )
    }
}
