"""Surfaces of a mask as a mesh to look at: GLB (with colours), OBJ and STL, short formats that are written here."""
import dataclasses
import json
import struct
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from vishub.errors import import_extra

__all__ = ['Surface', 'glb', 'obj', 'stl', 'surfaces']

_MOST_VOXELS = 4_000_000  # of a class's box; beyond, every so manieth is taken: a browser draws no more
Colour = Tuple[int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Surface:
    """The surface of one class.

    Attributes:
        name, colour: Of the class; the colour as RGB, 0 to 255.
        vertices: float32 (N, 3): millimetres right, anterior, superior.
        faces: uint32 (M, 3), anti-clockwise from outside.
    """
    name: str
    colour: Colour
    vertices: np.ndarray
    faces: np.ndarray


def surfaces(mask: np.ndarray, affine: np.ndarray, names: Sequence[str], colours: Sequence[Colour]) -> List[Surface]:
    """Marching cubes (Lorensen & Cline 1987) around each foreground class.

    Args:
        mask: uint8 (D, H, W).
        affine: (d, h, w, 1) -> millimetres.
        names, colours: Of the classes 1, 2, ….
    """
    measure = import_extra('skimage.measure', 'medical')
    found = []
    for kind, (name, colour) in enumerate(zip(names, colours), 1):
        inside = mask == kind
        if not inside.any():
            continue
        box = [_extent(inside.any(tuple(a for a in range(3) if a != axis))) for axis in range(3)]
        part = inside[tuple(slice(low, high) for low, high in box)]
        stride = max(1, int(np.ceil((part.size / _MOST_VOXELS) ** (1 / 3))))
        part = np.pad(part[::stride, ::stride, ::stride], 1).astype(np.float32)
        vertices, faces, _, _ = measure.marching_cubes(part, 0.5)
        places = (vertices - 1) * stride + [low for low, _ in box]
        places = places @ affine[:3, :3].T + affine[:3, 3]
        # skimage winds faces for axes of a right hand, towards lower values; a mirrored grid turns them over
        faces = faces if np.linalg.det(affine[:3, :3]) < 0 else faces[:, ::-1]
        found.append(Surface(name, colour, places.astype(np.float32), np.ascontiguousarray(faces, np.uint32)))
    return found


def _extent(line: np.ndarray) -> Tuple[int, int]:
    places = np.flatnonzero(line)
    return int(places[0]), int(places[-1]) + 1


def glb(parts: Sequence[Surface]) -> bytes:
    """glTF 2.0 in one file, in metres, Y up (superior) and Z towards the viewer (anterior)."""
    chunks: List[bytes] = []
    views: List[Dict[str, Any]] = []
    accessors: List[Dict[str, Any]] = []
    meshes: List[Dict[str, Any]] = []
    materials: List[Dict[str, Any]] = []

    def add(values: np.ndarray, kind: str, component: int, target: int, **bounds: List[float]) -> int:
        views.append({
            'buffer': 0, 'byteOffset': sum(map(len, chunks)), 'byteLength': values.nbytes, 'target': target})
        chunks.append(values.tobytes())  # 4 bytes a number, so that all stays aligned
        accessors.append({'bufferView': len(views) - 1, 'componentType': component, 'count': len(values), 'type': kind,
                          **bounds})
        return len(accessors) - 1

    for part in parts:
        right, anterior, superior = part.vertices.T / 1000
        places = np.stack([-right, superior, anterior], 1).astype('<f4')  # seen from the front, right is left
        position = add(places, 'VEC3', 5126, 34962, min=places.min(0).tolist(), max=places.max(0).tolist())
        normal = add(_normals(places, part.faces).astype('<f4'), 'VEC3', 5126, 34962)
        index = add(part.faces.reshape(-1, 1).astype('<u4'), 'SCALAR', 5125, 34963)
        meshes.append({'name': part.name, 'primitives': [{
            'attributes': {'POSITION': position, 'NORMAL': normal}, 'indices': index, 'material': len(materials)}]})
        materials.append({'name': part.name, 'doubleSided': True, 'pbrMetallicRoughness': {
            'baseColorFactor': [*((c / 255) ** 2.2 for c in part.colour), 1.], 'metallicFactor': 0.,
            'roughnessFactor': 0.6}})
    content = b''.join(chunks)
    document = {
        'asset': {'version': '2.0', 'generator': 'vishub'}, 'scene': 0,
        'scenes': [{'nodes': list(range(len(meshes)))}],
        'nodes': [{'mesh': number, 'name': part.name} for number, part in enumerate(parts)],
    }
    if parts:
        document.update(
            meshes=meshes, materials=materials, accessors=accessors, bufferViews=views,
            buffers=[{'byteLength': len(content)}])
    text = json.dumps(document, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 4)
    blocks = struct.pack('<II', len(text), 0x4E4F534A) + text
    if content:
        blocks += struct.pack('<II', len(content), 0x004E4942) + content
    return struct.pack('<III', 0x46546C67, 2, 12 + len(blocks)) + blocks


def _normals(places: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals (N, 3) of the vertices: means over the faces around, weighted by their areas."""
    a, b, c = (places[faces[:, corner]].astype(np.float64) for corner in range(3))
    across = np.cross(b - a, c - a)
    normals = np.stack([
        np.bincount(faces.T.ravel(), np.tile(across[:, axis], 3), len(places)) for axis in range(3)], 1)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)


def obj(parts: Sequence[Surface]) -> bytes:
    """Wavefront OBJ, millimetres right, anterior, superior; a group a class."""
    lines, first = ['# vishub'], 1
    for part in parts:
        lines.append(f'g {part.name.replace(" ", "_")}')
        lines += [f'v {x:.3f} {y:.3f} {z:.3f}' for x, y, z in part.vertices.tolist()]
        lines += [f'f {a} {b} {c}' for a, b, c in np.add(part.faces, first, dtype=np.int64).tolist()]
        first += len(part.vertices)
    return ('\n'.join(lines) + '\n').encode()


def stl(parts: Sequence[Surface]) -> bytes:
    """Binary STL of all classes, millimetres right, anterior, superior."""
    corners = np.concatenate([part.vertices[part.faces] for part in parts]) if parts else np.zeros((0, 3, 3))
    facets = np.zeros(len(corners), np.dtype([('normal', '<f4', 3), ('corners', '<f4', (3, 3)), ('count', '<u2')]))
    facets['corners'] = corners
    return b'vishub'.ljust(80, b'\0') + struct.pack('<I', len(facets)) + facets.tobytes()
