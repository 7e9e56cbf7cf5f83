package nodes

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// field is a field of a protobuf message. Numbers are of no interest here: bytes is empty
// for those.
type field struct {
	number int
	bytes  []byte
}

var errWire = errors.New("not protobuf")

// Wire types.
const (
	wireVarint  = 0
	wireFixed64 = 1
	wireBytes   = 2
	wireFixed32 = 5
)

// fields calls visit for each field of a message.
func fields(data []byte, visit func(field) error) error {
	for len(data) > 0 {
		tag, n := binary.Uvarint(data)
		if n <= 0 || tag>>3 == 0 || tag>>3 > 1<<29 {
			return errWire
		}
		data = data[n:]
		f := field{number: int(tag >> 3)}
		size := 0
		switch tag & 7 {
		case wireVarint:
			if _, size = binary.Uvarint(data); size <= 0 {
				return errWire
			}
		case wireFixed64:
			size = 8
		case wireFixed32:
			size = 4
		case wireBytes:
			length, n := binary.Uvarint(data)
			if n <= 0 || length > uint64(len(data)-n) {
				return errWire
			}
			data, size = data[n:], int(length)
			f.bytes = data[:size]
		default:
			return errWire
		}
		if size > len(data) {
			return errWire
		}
		data = data[size:]
		if err := visit(f); err != nil {
			return err
		}
	}
	return nil
}

// The envelope of an object: a magic number, then a runtime.Unknown whose field raw is the
// object. A list has metadata and items.
const (
	magic = "k8s\x00"

	unknownRaw = 2

	listMetadata, listItems = 1, 2
	listVersion             = 2
)

// maxNode bounds what is read for one object: etcd takes no more than 1.5 MiB.
const maxNode = 8 << 20

// readList reads a list while it comes, one object at a time, and returns its resource
// version. The whole of it is never in memory.
func readList(r io.Reader, each func(*node)) (version string, err error) {
	in := bufio.NewReaderSize(r, 64<<10)
	if first, err := in.Peek(1); err == nil && first[0] == '{' {
		return readJSONList(in, each)
	}
	var start [len(magic)]byte
	if _, err := io.ReadFull(in, start[:]); err != nil {
		return "", cut(err)
	}
	if string(start[:]) != magic {
		return "", fmt.Errorf("%w: the answer begins with %q", errWire, start)
	}
	found := false
	err = stream(in, -1, func(number int, size int64) (bool, error) {
		if number != unknownRaw {
			return false, nil
		}
		found = true
		var buffer []byte
		return true, stream(in, size, func(number int, size int64) (bool, error) {
			if number != listMetadata && number != listItems {
				return false, nil
			}
			if size > maxNode {
				return true, fmt.Errorf("%w: an object of %d bytes", errWire, size)
			}
			if int64(cap(buffer)) < size {
				buffer = make([]byte, size)
			}
			buffer = buffer[:size]
			if _, err := io.ReadFull(in, buffer); err != nil {
				return true, cut(err)
			}
			if number == listItems {
				n := &node{}
				err := n.Unmarshal(buffer)
				each(n)
				return true, err
			}
			return true, fields(buffer, func(f field) error {
				if f.number == listVersion {
					version = string(f.bytes)
				}
				return nil
			})
		})
	})
	if err == nil && (!found || version == "") {
		err = fmt.Errorf("%w: a list without a resource version", errWire)
	}
	return version, err
}

// stream calls visit for each field of a message of that many bytes, or to the end if that
// is less than zero. visit reads fields of bytes itself, or says that they are to be skipped.
func stream(in *bufio.Reader, size int64, visit func(number int, size int64) (read bool, err error)) error {
	for size != 0 {
		tag, n, err := uvarint(in)
		if err == io.EOF && size < 0 {
			return nil
		} else if err != nil {
			return cut(err)
		}
		value, skip := int64(0), int64(0)
		switch tag & 7 {
		case wireVarint:
			_, m, err := uvarint(in)
			if err != nil {
				return cut(err)
			}
			n += m
		case wireFixed64:
			skip = 8
		case wireFixed32:
			skip = 4
		case wireBytes:
			length, m, err := uvarint(in)
			if err != nil {
				return cut(err)
			}
			if length > 1<<40 || size >= 0 && int64(length) > size-n-m {
				return errWire
			}
			value, n = int64(length), n+m
			read, err := visit(int(tag>>3), value)
			if err != nil {
				return err
			}
			if !read {
				skip = value
			}
		default:
			return errWire
		}
		if skipped, err := io.CopyN(io.Discard, in, skip); err != nil || skipped != skip {
			return cut(err)
		}
		if size >= 0 {
			if size -= n + max(value, skip); size < 0 {
				return errWire
			}
		}
	}
	return nil
}

// uvarint also tells how long it is. io.EOF: there was nothing at all.
func uvarint(in *bufio.Reader) (value uint64, n int64, err error) {
	for shift := 0; shift < 64; shift += 7 {
		b, err := in.ReadByte()
		if err == io.EOF && n > 0 {
			return 0, n, io.ErrUnexpectedEOF
		} else if err != nil {
			return 0, n, err
		}
		n++
		value |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return value, n, nil
		}
	}
	return 0, n, errWire
}

// cut is the error of an answer that ended too early.
func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
