package iptables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/policy"
)

// Sets are written by netlink: many prefixes in a message, and no binary needed.

const (
	setType   = "hash:net"
	setMax    = 1 << 17 // entries, unless there are more
	setBatch  = 1000    // entries in a message: a nested attribute holds 64 KiB
	listNames = 1 << 1  // IPSET_FLAG_LIST_SETNAME
)

// kernelSet is a set as the kernel lists it.
type kernelSet struct {
	Set
	typ     string
	family  uint8
	strange int // entries with more than a prefix: nomatch, a timeout, counters
}

// holds tells whether the set holds just these prefixes, with nothing added to them.
func (s kernelSet) holds(prefixes []netip.Prefix) bool {
	return s.strange == 0 && slices.Equal(s.Prefixes, prefixes)
}

func (f Family) netlink() uint8 {
	if f == IPv4 {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func setRequest(cmd, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(cmd|unix.NFNL_SUBSYS_IPSET<<8, flags)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_INET, Version: nl.NFNETLINK_V0})
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_PROTOCOL, nl.Uint8Attr(nl.IPSET_PROTOCOL)))
	return req
}

func named(req *nl.NetlinkRequest, name string) *nl.NetlinkRequest {
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_SETNAME, nl.ZeroTerminated(name)))
	return req
}

// executeSet sends a request from the namespace of the calling thread.
func executeSet(req *nl.NetlinkRequest) ([][]byte, error) {
	msgs, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	var errno syscall.Errno
	if errors.As(err, &errno) && errno >= nl.IPSET_ERR_PRIVATE {
		err = nl.IPSetError(errno)
	}
	return msgs, err
}

// setsSupported tells whether the kernel has sets; a module is loaded for that.
func setsSupported() bool {
	_, err := executeSet(setRequest(nl.IPSET_CMD_PROTOCOL, unix.NLM_F_REQUEST|unix.NLM_F_ACK))
	return err == nil
}

func createSet(name string, f Family, size int) error {
	req := named(setRequest(nl.IPSET_CMD_CREATE, unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL), name)
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_TYPENAME, nl.ZeroTerminated(setType)))
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_REVISION, nl.Uint8Attr(0)))
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_FAMILY, nl.Uint8Attr(f.netlink())))
	data := nl.NewRtAttr(nl.IPSET_ATTR_DATA|int(nl.NLA_F_NESTED), nil)
	// As large as it will get: the kernel would double it again and again.
	hash := uint32(max(64, 1<<bits.Len(uint(size/2))))
	data.AddChild(&nl.Uint32Attribute{Type: nl.IPSET_ATTR_HASHSIZE | nl.NLA_F_NET_BYTEORDER, Value: hash})
	data.AddChild(&nl.Uint32Attribute{Type: nl.IPSET_ATTR_MAXELEM | nl.NLA_F_NET_BYTEORDER, Value: uint32(max(setMax, size))})
	req.AddData(data)
	_, err := executeSet(req)
	return err
}

func fillSet(name string, prefixes []netip.Prefix) error {
	for chunk := range slices.Chunk(prefixes, setBatch) {
		req := named(setRequest(nl.IPSET_CMD_ADD, unix.NLM_F_REQUEST|unix.NLM_F_ACK), name)
		req.AddData(&nl.Uint32Attribute{Type: nl.IPSET_ATTR_LINENO | nl.NLA_F_NET_BYTEORDER})
		var body []byte
		for _, p := range chunk {
			body = appendEntry(body, p)
		}
		req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_ADT|int(nl.NLA_F_NESTED), body))
		if _, err := executeSet(req); err != nil {
			return err
		}
	}
	return nil
}

// appendEntry adds the attributes of an entry: {DATA {IP {address}, CIDR}}.
func appendEntry(b []byte, p netip.Prefix) []byte {
	addr, typ := p.Addr().AsSlice(), nl.IPSET_ATTR_IPADDR_IPV4
	if p.Addr().Is6() {
		typ = nl.IPSET_ATTR_IPADDR_IPV6
	}
	attr := func(size, typ int) {
		b = binary.NativeEndian.AppendUint16(b, uint16(size))
		b = binary.NativeEndian.AppendUint16(b, uint16(typ))
	}
	attr(20+len(addr), nl.IPSET_ATTR_DATA|int(nl.NLA_F_NESTED))
	attr(8+len(addr), nl.IPSET_ATTR_IP|int(nl.NLA_F_NESTED))
	attr(4+len(addr), typ|int(nl.NLA_F_NET_BYTEORDER))
	b = append(b, addr...)
	attr(5, nl.IPSET_ATTR_CIDR)
	return append(b, uint8(p.Bits()), 0, 0, 0)
}

func destroySet(name string) error {
	_, err := executeSet(named(setRequest(nl.IPSET_CMD_DESTROY, unix.NLM_F_REQUEST|unix.NLM_F_ACK), name))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func swapSets(a, b string) error {
	req := named(setRequest(nl.IPSET_CMD_SWAP, unix.NLM_F_REQUEST|unix.NLM_F_ACK), a)
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_SETNAME2, nl.ZeroTerminated(b)))
	_, err := executeSet(req)
	return err
}

// readSet lists a set; ok is false if there is none of this name.
func readSet(name string) (s kernelSet, ok bool, err error) {
	req := named(setRequest(nl.IPSET_CMD_LIST, unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_DUMP), name)
	msgs, err := executeSet(req)
	if errors.Is(err, unix.ENOENT) {
		return s, false, nil
	} else if err != nil {
		return s, false, fmt.Errorf("set %s: %w", name, err)
	}
	s.Name = name
	for _, msg := range msgs {
		s.parse(msg)
	}
	slices.SortFunc(s.Prefixes, policy.ComparePrefixes)
	return s, true, nil
}

func (s *kernelSet) parse(msg []byte) {
	for typ, value := range attributes(msg[4:]) {
		switch typ {
		case nl.IPSET_ATTR_TYPENAME:
			s.typ = nl.BytesToString(value)
		case nl.IPSET_ATTR_FAMILY:
			s.family = value[0]
		case nl.IPSET_ATTR_ADT:
			for _, entry := range attributes(value) {
				switch p, plain := parseEntry(entry); {
				case !plain:
					s.strange++
				case p.IsValid():
					s.Prefixes = append(s.Prefixes, p)
				}
			}
		}
	}
}

// parseEntry returns the zero Prefix for an entry that is none. plain is false if it has
// something that ours don't have, such as nomatch.
func parseEntry(b []byte) (p netip.Prefix, plain bool) {
	var addr netip.Addr
	length := -1
	plain = true
	for typ, value := range attributes(b) {
		switch typ {
		case nl.IPSET_ATTR_IP:
			for _, inner := range attributes(value) {
				addr, _ = netip.AddrFromSlice(inner)
			}
		case nl.IPSET_ATTR_CIDR:
			length = int(value[0])
		default:
			plain = false
		}
	}
	if length < 0 {
		length = addr.BitLen() // full length is not listed
	}
	return netip.PrefixFrom(addr, length), plain
}

// attributes goes through the attributes of a message, types without flags. That of the
// library starts a goroutine each time, which makes a large set slow to read.
func attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= 4 {
			size, typ := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])
			if size < 4 || size > len(b) || !yield(typ&nl.NLA_TYPE_MASK, b[4:size]) {
				return
			}
			b = b[min((size+3)&^3, len(b)):]
		}
	}
}

// setNames lists the sets that are ours.
func setNames() ([]string, error) {
	req := setRequest(nl.IPSET_CMD_LIST, unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_DUMP)
	req.AddData(&nl.Uint32Attribute{Type: nl.IPSET_ATTR_FLAGS | nl.NLA_F_NET_BYTEORDER, Value: listNames})
	msgs, err := executeSet(req)
	if err != nil {
		return nil, fmt.Errorf("sets: %w", err)
	}
	var names []string
	for _, msg := range msgs {
		for typ, value := range attributes(msg[4:]) {
			if typ != nl.IPSET_ATTR_SETNAME {
				continue
			}
			if name := nl.BytesToString(value); strings.HasPrefix(name, setPrefix) {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}
