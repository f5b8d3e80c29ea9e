//! An Arrow IPC stream of one record batch, out of bytes of somebody who need not be trusted.
//!
//! * arrow-rs allocates what lengths say before it reads, so these are compared with what is there first.
//! * A gateway's messages have the same devices, so they repeat their dictionaries byte by byte. A [`Decoder`] keeps
//!   those that it has read: to set up zstd for one costs more than to decode the readings of a hundred devices.

use std::{
    collections::HashMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use arrow::{
    array::{Array as _, ArrayRef, RecordBatch},
    buffer::Buffer,
    datatypes::SchemaRef,
    error::ArrowError,
    ipc::{
        Message, MessageHeader, Schema as SchemaHeader, Type,
        convert::fb_to_schema,
        reader::{read_dictionary, read_record_batch},
        root_as_message,
    },
};

use super::{Lane, WireError, conform};

/// Most bytes that an Arrow payload may decode to; a smaller payload that claims more is refused.
const MAX_DECODED: usize = 256 * 1024 * 1024;
/// Dictionaries of more bytes than this are not kept.
const LARGE: usize = 64 * 1024;
/// Most bytes of dictionaries that are kept.
const MAX_KEPT: usize = 16 * 1024 * 1024;

/// Reads the payloads of lanes. One that has read others of the same gateways is faster, and no different.
#[derive(Default)]
pub struct Decoder {
    /// Dictionaries of text by the bytes of their message.
    kept: HashMap<Box<[u8]>, ArrayRef>,
    kept_bytes: usize,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Decoder({} dictionaries, {} B)", self.kept.len(), self.kept_bytes)
    }
}

impl Decoder {
    /// [`super::decode`], with what the payload repeats of the message's identity.
    ///
    /// # Errors
    /// See [`super::decode`].
    pub fn decode(
        &mut self,
        lane: Lane,
        payload: &[u8],
    ) -> Result<(RecordBatch, HashMap<String, String>), WireError> {
        // arrow-rs checks offsets, lengths and UTF-8 of what it reads, but some malformed metadata still
        // trips an assertion in it; a poison message must not take its reader down.
        let read = catch_unwind(AssertUnwindSafe(|| self.read(payload)));
        let batch = read.unwrap_or_else(|_| Err(malformed("malformed metadata")))?;
        let metadata = batch.schema_ref().metadata().clone();
        Ok((conform(lane, &batch)?, metadata))
    }

    /// The batch, with the columns that it says it has. May panic.
    pub(super) fn read(&mut self, payload: &[u8]) -> Result<RecordBatch, WireError> {
        let arrow = |e: ArrowError| malformed(&e.to_string());
        let mut parts = Parts { rest: payload, decoded: 0 };
        let first = parts.next()?.ok_or_else(|| malformed("it is empty"))?;
        let header =
            first.message.header_as_schema().ok_or_else(|| malformed("it does not begin with a schema"))?;
        let schema: SchemaRef = Arc::new(fb_to_schema(header));
        let mut dictionaries: HashMap<i64, ArrayRef> = HashMap::new();
        let mut read = None;
        while let Some(Part { message, bytes, body }) = parts.next()? {
            let version = message.version();
            match message.header_type() {
                MessageHeader::DictionaryBatch => {
                    let dictionary = message
                        .header_as_dictionary_batch()
                        .ok_or_else(|| malformed("a dictionary without a header"))?;
                    let id = dictionary.id();
                    let keeps = !dictionary.isDelta() && bytes.len() <= LARGE && is_text(header, id);
                    if keeps && let Some(known) = self.kept.get(bytes) {
                        dictionaries.insert(id, Arc::clone(known));
                        continue;
                    }
                    read_dictionary(&Buffer::from(body), dictionary, &schema, &mut dictionaries, &version)
                        .map_err(arrow)?;
                    if let Some(words) = dictionaries.get(&id).filter(|_| keeps) {
                        self.keep(bytes, words);
                    }
                }
                MessageHeader::RecordBatch if read.is_none() => {
                    let batch = message
                        .header_as_record_batch()
                        .ok_or_else(|| malformed("a batch without a header"))?;
                    let body = Buffer::from(body);
                    let batch =
                        read_record_batch(&body, batch, Arc::clone(&schema), &dictionaries, None, &version);
                    read = Some(batch.map_err(arrow)?);
                }
                MessageHeader::RecordBatch => return Err(malformed("it holds more than one batch")),
                other => {
                    return Err(malformed(&format!("a message of kind {other:?} where its batch belongs")));
                }
            }
        }
        read.ok_or_else(|| malformed("it holds no batch"))
    }

    fn keep(&mut self, bytes: &[u8], words: &ArrayRef) {
        let size = bytes.len() + words.get_array_memory_size();
        if size > LARGE {
            return;
        }
        if self.kept_bytes + size > MAX_KEPT {
            self.kept.clear();
            self.kept_bytes = 0;
        }
        self.kept_bytes += size;
        self.kept.insert(bytes.into(), Arc::clone(words));
    }
}

fn malformed(what: &str) -> WireError {
    WireError::Payload(what.to_owned())
}

/// Whether a dictionary's values are text to every column that uses it: then its bytes alone say what it is.
fn is_text(schema: SchemaHeader<'_>, id: i64) -> bool {
    let fields = schema.fields().into_iter().flatten();
    let mut types = fields.filter(|f| f.dictionary().is_some_and(|d| d.id() == id)).map(|f| f.type_type());
    types.next() == Some(Type::Utf8) && types.all(|other| other == Type::Utf8)
}

/// A message of the stream.
struct Part<'a> {
    message: Message<'a>,
    /// Header and body.
    bytes: &'a [u8],
    body: &'a [u8],
}

/// The messages of a stream. None has a header or a body that is longer than the payload, nor compressed buffers that
/// claim to decode to more than [`MAX_DECODED`] with those before it.
struct Parts<'a> {
    rest: &'a [u8],
    decoded: usize,
}

impl<'a> Parts<'a> {
    fn next(&mut self) -> Result<Option<Part<'a>>, WireError> {
        let Some((head, tail)) = self.rest.split_first_chunk::<4>() else { return Ok(None) };
        let (length, tail) = match u32::from_le_bytes(*head) {
            u32::MAX => tail.split_first_chunk::<4>().map(|(l, t)| (u32::from_le_bytes(*l), t)),
            length => Some((length, tail)),
        }
        .ok_or_else(|| malformed("it ends within a message length"))?;
        if length == 0 {
            self.rest = &[];
            return Ok(None);
        }
        let (header, after) =
            tail.split_at_checked(length as usize).ok_or_else(|| malformed("it ends within a message"))?;
        let message =
            root_as_message(header).map_err(|e| malformed(&format!("broken message header: {e}")))?;
        let length = usize::try_from(message.bodyLength()).map_err(|_| malformed("negative body length"))?;
        let (body, after) =
            after.split_at_checked(length).ok_or_else(|| malformed("it ends within a message body"))?;
        self.decoded = self.decoded.saturating_add(claimed(&message, body));
        if self.decoded > MAX_DECODED {
            return Err(malformed(&format!("it decodes to {} B, more than {MAX_DECODED} B", self.decoded)));
        }
        self.rest = after;
        Ok(Some(Part { message, bytes: &tail[..header.len() + length], body }))
    }
}

/// The bytes that the compressed buffers of a message say they decode to.
fn claimed(message: &Message<'_>, body: &[u8]) -> usize {
    let batch = message
        .header_as_record_batch()
        .or_else(|| message.header_as_dictionary_batch().and_then(|d| d.data()))
        .filter(|batch| batch.compression().is_some());
    let claim = |buffer: &arrow::ipc::Buffer| {
        let start = usize::try_from(buffer.offset()).ok()?;
        // A compressed buffer begins with its decoded length; -1 stands for "as it is".
        let (prefix, _) = body.get(start..)?.split_first_chunk::<8>().filter(|_| buffer.length() >= 8)?;
        usize::try_from(i64::from_le_bytes(*prefix)).ok()
    };
    let buffers = batch.and_then(|b| b.buffers()).into_iter().flatten();
    buffers.filter_map(claim).fold(0, usize::saturating_add)
}
