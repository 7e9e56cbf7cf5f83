package main

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"
)

// ping sends one ICMP echo request and waits for its answer.
func ping(ctx context.Context, to netip.Addr) error {
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if to.Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	var lc net.ListenConfig
	c, err := lc.ListenPacket(ctx, network, "")
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()

	m := make([]byte, 16)
	m[0] = request
	id := uint16(rand.Uint32())
	binary.BigEndian.PutUint16(m[4:], id)
	binary.BigEndian.PutUint16(m[6:], 1)
	if to.Is4() { // the kernel fills in that of ICMPv6
		binary.BigEndian.PutUint16(m[2:], checksum(m))
	}
	if _, err := c.WriteTo(m, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return err
	}
	buf := make([]byte, 1<<10)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return errors.Join(err, ctx.Err())
		}
		who, _ := netip.AddrFromSlice(from.(*net.IPAddr).IP)
		if who.Unmap() == to && n >= 8 && buf[0] == reply && binary.BigEndian.Uint16(buf[4:]) == id {
			return nil
		}
	}
}

// checksum is the internet checksum of RFC 1071, of an even number of bytes.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
