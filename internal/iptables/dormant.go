package iptables

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

// A table of nft that is dormant holds its rules, and iptables lists them, but the kernel
// has taken its hooks away: no packet comes to them. iptables can neither show nor change it.

func (f Family) nft() uint8 {
	if f == IPv4 {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

// markDormant adds to the states of tables whether they are dormant.
func (p program) markDormant(states map[string]tableState) error {
	if p.backend != NFT {
		return nil
	}
	for name, s := range states {
		flags, err := tableFlags(p.family, name)
		if err != nil {
			return err
		}
		s.dormant = flags&unix.NFT_TABLE_F_DORMANT != 0
		states[name] = s
	}
	return nil
}

// wake lets packets come to a table again. Whoever put it to sleep did so to the rules of
// all programs in it.
func (p program) wake(table string) error {
	flags, err := tableFlags(p.family, table)
	if err != nil {
		return err
	}
	if err := setTableFlags(p.family, table, flags&^unix.NFT_TABLE_F_DORMANT); err != nil {
		family := map[Family]string{IPv4: "ip", IPv6: "ip6"}[p.family]
		return advice.New(fmt.Errorf("table %s: dormant, and not to be woken: %w", table, err),
			fmt.Sprintf("`nft add table %s %s` wakes it; its owner may be the only one who can", family, table))
	}
	return nil
}

func nftMessage(typ, flags int, f Family) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|typ, flags)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: f.nft(), Version: nl.NFNETLINK_V0})
	return req
}

// tableFlags are those of a table; one that is not there has none.
func tableFlags(f Family, table string) (flags uint32, err error) {
	req := nftMessage(unix.NFT_MSG_GETTABLE, unix.NLM_F_REQUEST|unix.NLM_F_ACK, f)
	req.AddData(nl.NewRtAttr(unix.NFTA_TABLE_NAME, nl.ZeroTerminated(table)))
	msgs, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	} else if err != nil {
		return 0, fmt.Errorf("flags of table %s: %w", table, err)
	}
	for _, msg := range msgs {
		for typ, b := range attributes(msg[4:]) {
			if typ == unix.NFTA_TABLE_FLAGS && len(b) == 4 {
				flags = binary.BigEndian.Uint32(b)
			}
		}
	}
	return flags, nil
}

// setTableFlags changes a table that is there.
func setTableFlags(f Family, table string, flags uint32) error {
	change := nftMessage(unix.NFT_MSG_NEWTABLE, unix.NLM_F_REQUEST|unix.NLM_F_ACK, f)
	change.AddData(nl.NewRtAttr(unix.NFTA_TABLE_NAME, nl.ZeroTerminated(table)))
	change.AddData(nl.NewRtAttr(unix.NFTA_TABLE_FLAGS, binary.BigEndian.AppendUint32(nil, flags)))
	return sendBatch(change)
}

// sendBatch sends a change of nft objects: a batch of one message.
func sendBatch(change *nl.NetlinkRequest) error {
	batch := append(batchMark(unix.NFNL_MSG_BATCH_BEGIN), change.Serialize()...)
	batch = append(batch, batchMark(unix.NFNL_MSG_BATCH_END)...)

	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// The kernel answers before sendto returns; the limit is for what should not be.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		return err
	}
	if err := unix.Sendto(fd, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return err
	}
	const header = unix.SizeofNlMsghdr
	if n < header+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return errors.New("not an answer of nft")
	}
	if code := int32(binary.NativeEndian.Uint32(answer[header:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}

// batchMark begins or ends a batch; the family's place says for which subsystem it is.
func batchMark(typ int) []byte {
	req := nl.NewNetlinkRequest(typ, unix.NLM_F_REQUEST)
	subsystem := binary.NativeEndian.Uint16([]byte{0, unix.NFNL_SUBSYS_NFTABLES})
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0, ResId: subsystem})
	return req.Serialize()
}
