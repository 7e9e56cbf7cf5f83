package iptables

import (
	"encoding/binary"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// generation is a number that each change of nft rules in the namespace changes, of
// whoever; ok is false where the kernel does not tell. While it stays, there is no need
// to list rules, of which others may have very many.
func (t *Tables) generation() (n uint32, ok bool) {
	if t.backend != NFT {
		return 0, false
	}
	const getGeneration = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN
	req := nl.NewNetlinkRequest(getGeneration, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
	msgs, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return 0, false
	}
	for _, msg := range msgs {
		for typ, value := range attributes(msg[4:]) {
			if typ == unix.NFTA_GEN_ID && len(value) == 4 {
				return binary.BigEndian.Uint32(value), true
			}
		}
	}
	return 0, false
}
