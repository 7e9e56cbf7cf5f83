package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Packet is a captured frame.
type Packet struct {
	Data     []byte // from the link-layer header on; a VLAN tag is not in it
	Outgoing bool   // it left through the device; false: it arrived
}

// CaptureOptions bound what a Capture remembers.
type CaptureOptions struct {
	MaxPackets int // 0 = 4096; then the oldest is forgotten
	SnapLen    int // bytes remembered of each; 0 = all
	// Incoming leaves out what the device sends.
	Incoming bool
}

// Capture records what passes a device. What it sees leaving is what is on the
// wire: the tap is behind the egress programs, and before the ingress programs.
//
// The methods that answer a question first read whatever the kernel has queued:
// a packet that was on the wire before the call is part of the answer.
type Capture struct {
	file *os.File
	opts CaptureOptions
	done chan struct{}

	mu       sync.Mutex
	buf      []byte
	ring     []Packet
	seen     int
	lost     int
	counters []*Counter
}

// Counter counts the packets for which its predicate is true, also those that
// the capture has forgotten since.
type Counter struct {
	capture *Capture
	match   func(Packet) bool
	n       int
}

// StartCapture starts a capture on a device, or with an empty name on all
// devices of the namespace.
func StartCapture(ns *NS, dev string, opts CaptureOptions) (*Capture, error) {
	if opts.MaxPackets == 0 {
		opts.MaxPackets = 4096
	}
	fd := -1
	err := ns.Do(func() (err error) {
		fd, err = openTap(ns, dev)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("capture %s in %s: %w", dev, ns, err)
	}
	c := &Capture{
		file: os.NewFile(uintptr(fd), "capture "+dev), opts: opts,
		done: make(chan struct{}), buf: make([]byte, 1<<17),
	}
	go c.run()
	return c, nil
}

func openTap(ns *NS, dev string) (int, error) {
	// Protocol 0 hears nothing, until bind names protocol and device at once:
	// otherwise packets of other devices would be queued in between.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	to := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL)}
	if dev != "" {
		if to.Ifindex, err = ns.Index(dev); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	err = errors.Join(
		// Enough for a bulk transfer between two looks; the default loses packets.
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
		unix.Bind(fd, to))
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func htons(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}

// run empties the queue whenever something is in it. The answer "not yet" makes
// the poller wait; Stop interrupts it.
func (c *Capture) run() {
	defer close(c.done)
	raw, err := c.file.SyscallConn()
	if err != nil {
		return
	}
	raw.Read(func(uintptr) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.drain()
		return false
	})
}

// drain reads until the queue is empty, at most for as long as a test may take
// to look: a flood must not keep it here.
func (c *Capture) drain() {
	raw, err := c.file.SyscallConn()
	if err != nil {
		return // stopped: everything was read then
	}
	deadline := time.Now().Add(2 * time.Second)
	raw.Control(func(fd uintptr) {
		for time.Now().Before(deadline) {
			n, from, err := unix.Recvfrom(int(fd), c.buf, unix.MSG_TRUNC)
			if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENETDOWN) {
				continue // ENETDOWN is told once, and the capture goes on
			}
			if err != nil {
				break
			}
			c.add(c.buf[:min(n, len(c.buf))], from)
		}
		if st, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			c.lost += int(st.Drops)
		}
	})
}

func (c *Capture) add(data []byte, from unix.Sockaddr) {
	ll, ok := from.(*unix.SockaddrLinklayer)
	out := ok && ll.Pkttype == unix.PACKET_OUTGOING
	if out && c.opts.Incoming {
		return
	}
	p := Packet{Data: data, Outgoing: out}
	for _, k := range c.counters {
		if k.match(p) {
			k.n++
		}
	}
	if c.opts.SnapLen > 0 {
		data = data[:min(len(data), c.opts.SnapLen)]
	}
	p.Data = append([]byte(nil), data...)
	if len(c.ring) < c.opts.MaxPackets {
		c.ring = append(c.ring, p)
	} else {
		c.ring[c.seen%len(c.ring)] = p
	}
	c.seen++
}

// Count starts to count packets that match, beginning with those remembered.
// The predicate must not keep the packet's data.
func (c *Capture) Count(match func(Packet) bool) *Counter {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drain()
	k := &Counter{capture: c, match: match}
	for _, p := range c.ring {
		if match(p) {
			k.n++
		}
	}
	c.counters = append(c.counters, k)
	return k
}

// N returns the count.
func (k *Counter) N() int {
	k.capture.mu.Lock()
	defer k.capture.mu.Unlock()
	k.capture.drain()
	return k.n
}

// Packets returns the remembered packets, oldest first.
func (c *Capture) Packets() []Packet {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drain()
	start := 0
	if c.seen > len(c.ring) {
		start = c.seen % len(c.ring)
	}
	return append(append([]Packet(nil), c.ring[start:]...), c.ring[:start]...)
}

// Saw says whether a remembered packet matches.
func (c *Capture) Saw(match func(Packet) bool) bool {
	for _, p := range c.Packets() {
		if match(p) {
			return true
		}
	}
	return false
}

// Lost returns the number of packets the kernel could not queue. "Nothing was
// seen" proves nothing unless it is zero.
func (c *Capture) Lost() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drain()
	return c.lost
}

// Stop reads what is queued and ends the capture; what it has seen can still be
// asked for.
func (c *Capture) Stop() {
	c.mu.Lock()
	c.drain()
	c.mu.Unlock()
	c.file.Close()
	<-c.done
}
