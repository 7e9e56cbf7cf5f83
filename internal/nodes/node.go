package nodes

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// node is what we need of a core/v1 Node. Decoding skips all other fields: images and
// conditions are nine tenths of it.
type node struct {
	metav1.TypeMeta
	name, version string
	initialEnd    bool // a bookmark: all that there was has been sent
	podCIDRs      []string
	taints        []string // keys
	addresses     []address
}

type address struct{ kind, text string }

func (n *node) GetObjectKind() schema.ObjectKind { return &n.TypeMeta }

// DeepCopyObject is what the scheme asks of a type. Nothing changes what was decoded.
func (n *node) DeepCopyObject() runtime.Object {
	c := *n
	return &c
}

// Reset and Unmarshal are how the decoder reads protobuf.
func (n *node) Reset() { *n = node{} }

// Fields of k8s.io/api/core/v1/generated.proto; their numbers never change.
const (
	nodeMetadata, nodeSpec, nodeStatus = 1, 2, 3

	metaName, metaVersion, metaAnnotations = 1, 6, 12

	specPodCIDR, specTaints, specPodCIDRs = 1, 5, 7

	statusAddresses = 5

	pairKey, pairValue = 1, 2 // of a map; type and address of a NodeAddress; key and value of a Taint
)

func (n *node) Unmarshal(data []byte) error {
	var podCIDR string
	err := fields(data, func(f field) error {
		switch f.number {
		case nodeMetadata:
			return fields(f.bytes, n.metadata)
		case nodeSpec:
			return fields(f.bytes, func(f field) error {
				switch f.number {
				case specPodCIDR:
					podCIDR = string(f.bytes)
				case specTaints:
					key, _, err := pair(f.bytes)
					n.taints = append(n.taints, key)
					return err
				case specPodCIDRs:
					n.podCIDRs = append(n.podCIDRs, string(f.bytes))
				}
				return nil
			})
		case nodeStatus:
			return fields(f.bytes, func(f field) error {
				if f.number != statusAddresses {
					return nil
				}
				kind, text, err := pair(f.bytes)
				n.addresses = append(n.addresses, address{kind, text})
				return err
			})
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	n.ranged(podCIDR)
	return nil
}

// ranged takes the pod range of a cluster that knows one family only, if there are no others.
func (n *node) ranged(podCIDR string) {
	if len(n.podCIDRs) == 0 && podCIDR != "" {
		n.podCIDRs = []string{podCIDR}
	}
}

func (n *node) metadata(f field) error {
	switch f.number {
	case metaName:
		n.name = string(f.bytes)
	case metaVersion:
		n.version = string(f.bytes)
	case metaAnnotations:
		key, value, err := pair(f.bytes)
		n.initialEnd = n.initialEnd || key == metav1.InitialEventsAnnotationKey && value == "true"
		return err
	}
	return nil
}

// pair reads a message of two strings.
func pair(data []byte) (key, value string, err error) {
	err = fields(data, func(f field) error {
		switch f.number {
		case pairKey:
			key = string(f.bytes)
		case pairValue:
			value = string(f.bytes)
		}
		return nil
	})
	return key, value, err
}
