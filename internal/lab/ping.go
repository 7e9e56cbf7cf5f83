package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// ICMP types of echo messages.
const (
	echoReply4   = 0
	echoRequest4 = 8
	echoRequest6 = 128
	echoReply6   = 129
)

// Echo is one ICMP echo request.
type Echo struct {
	Dst     netip.Addr
	Src     netip.Addr // invalid = chosen by the kernel
	ID, Seq uint16
	Payload int // bytes
	TTL     int // 0 = default
	// DontFragment makes a packet that is too big for the path an ICMP error.
	DontFragment bool
}

// ICMPError is an ICMP error about an Echo.
type ICMPError struct {
	From       netip.Addr
	Type, Code byte
	MTU        int   // of "fragmentation needed" and "packet too big"
	Quote      Frame // the packet it is about, as far as quoted
}

func (e *ICMPError) Error() string {
	return fmt.Sprintf("icmp error from %s: type %d code %d", e.From, e.Type, e.Code)
}

// Ping sends one echo request and returns who answered. An ICMP error about it
// is an *ICMPError.
func Ping(ctx context.Context, ns *NS, dst netip.Addr, id, seq uint16, payloadLen int) (netip.Addr, error) {
	return Echo{Dst: dst, ID: id, Seq: seq, Payload: payloadLen}.Send(ctx, ns)
}

// Send sends the request and waits for its answer.
func (e Echo) Send(ctx context.Context, ns *NS) (netip.Addr, error) {
	network, local := "ip4:icmp", "0.0.0.0"
	if e.Dst.Is6() {
		network, local = "ip6:ipv6-icmp", "::"
	}
	if e.Src.IsValid() {
		local = e.Src.String()
	}
	c, err := ListenPacket(ns, net.ListenConfig{Control: e.control}, network, local)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("ping %s: %w", e.Dst, err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(past) })()

	to := &net.IPAddr{IP: e.Dst.AsSlice(), Zone: e.Dst.Zone()}
	if _, err := c.WriteTo(e.request(), to); err != nil {
		return netip.Addr{}, fmt.Errorf("ping %s: %w", e.Dst, err)
	}
	buf := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return netip.Addr{}, fmt.Errorf("ping %s from %s: %w", e.Dst, ns, err)
		}
		who, _ := netip.AddrFromSlice(from.(*net.IPAddr).IP)
		if mine, err := e.answer(buf[:n], who.Unmap()); mine {
			return who.Unmap(), err
		}
	}
}

func (e Echo) control(_, _ string, raw syscall.RawConn) (err error) {
	set := func(fd, level, opt, value int) {
		if err == nil {
			err = unix.SetsockoptInt(fd, level, opt, value)
		}
	}
	outer := raw.Control(func(fd uintptr) {
		level, ttl, discover, do := unix.IPPROTO_IP, unix.IP_TTL, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE
		if e.Dst.Is6() {
			level, ttl, discover = unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_MTU_DISCOVER
		}
		if e.TTL != 0 {
			set(int(fd), level, ttl, e.TTL)
		}
		if e.DontFragment {
			// PROBE, not DO: the second of two pings must not fail by what the
			// kernel has learned from the first.
			set(int(fd), level, discover, do)
		}
	})
	return errors.Join(outer, err)
}

// request builds the message. The kernel fills in the checksum of ICMPv6, which
// covers addresses that are not known here.
func (e Echo) request() []byte {
	b := make([]byte, 8+e.Payload)
	b[0] = echoRequest4
	if e.Dst.Is6() {
		b[0] = echoRequest6
	}
	binary.BigEndian.PutUint16(b[4:], e.ID)
	binary.BigEndian.PutUint16(b[6:], e.Seq)
	for i := range e.Payload {
		b[8+i] = byte(i)
	}
	if e.Dst.Is4() {
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	return b
}

// answer says whether a message is about this request, and if so which error it is.
func (e Echo) answer(b []byte, from netip.Addr) (mine bool, err error) {
	if len(b) < 8 {
		return false, nil
	}
	reply, request := byte(echoReply4), byte(echoRequest4)
	isError := func(t byte) bool { return t == 3 || t == 4 || t == 5 || t == 11 || t == 12 }
	if e.Dst.Is6() {
		reply, request = echoReply6, echoRequest6
		isError = func(t byte) bool { return t >= 1 && t < 128 }
	}
	if b[0] == reply {
		if !e.matches(b) {
			return false, nil
		}
		if want := e.request()[8:]; string(want) != string(b[8:]) {
			return true, fmt.Errorf("ping %s: %d bytes came back altered", e.Dst, len(b)-8)
		}
		return true, nil
	}
	if !isError(b[0]) {
		return false, nil
	}
	quote, ok := ParseIP(b[8:])
	if !ok || quote.Dst != e.Dst.WithZone("") || len(quote.L4) < 8 || quote.L4[0] != request || !e.matches(quote.L4) {
		return false, nil
	}
	ie := &ICMPError{From: from, Type: b[0], Code: b[1], Quote: quote}
	switch {
	case e.Dst.Is4() && b[0] == 3 && b[1] == 4:
		ie.MTU = int(binary.BigEndian.Uint16(b[6:]))
	case e.Dst.Is6() && b[0] == 2:
		ie.MTU = int(binary.BigEndian.Uint32(b[4:]))
	}
	return true, ie
}

func (e Echo) matches(b []byte) bool {
	return binary.BigEndian.Uint16(b[4:]) == e.ID && binary.BigEndian.Uint16(b[6:]) == e.Seq
}

// checksum is the internet checksum of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
